"""Keys and values of positions already read.

Shapes: B batch, G key-value heads, T capacity, Q new positions, K head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated; new positions go after the `length` already held. `trim` forgets, `clone` copies."""

    def __init__(
        self, layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, 2, batch, kv_heads, capacity, head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.kv.shape[4]

    def write(self, layer: int, k_BGQK: Tensor, v_BGQK: Tensor) -> tuple[Tensor, Tensor]:
        """Store after `length`, return all keys and values held so far. `advance` moves `length` once all layers have written."""
        end = self.length + k_BGQK.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {end} were asked for")
        self.kv[layer, 0, :, :, self.length : end] = k_BGQK
        self.kv[layer, 1, :, :, self.length : end] = v_BGQK
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def advance(self, count: int) -> None:
        self.length += count

    def trim(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot trim a cache of {self.length} positions to {length}")
        self.length = length

    def clone(self) -> KVCache:
        copy = object.__new__(KVCache)
        copy.kv, copy.length = self.kv.clone(), self.length
        return copy
