"""Blocks compiled by torch.compile for forward passes of few positions over a KV cache."""

from __future__ import annotations

import itertools
import os
import shutil
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.inference.fused import fuse
from dlm.models.block import Block
from dlm.models.cache import Memory
from dlm.models.transformer import Transformer

TOGETHER = 5  # blocks that are compiled as one at most: starting a graph takes time, compiling a large one far more


def compile(network: Transformer) -> Transformer:
    """Compile the blocks for calls of decoding, of few positions: most of their time goes into many small operations.

    The first call of a shape then takes seconds. The weights and the adapter have to stay as they are from here on: nothing but the
    shape of the input is checked before a compiled block is used, since a check of everything costs as much as it saves.
    """
    if network.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise InputError("a network is compiled with a C++ compiler, and there is none: install g++, or decode without compiling")
    network.compiled = CompiledBlocks(len(network.blocks))
    return fuse(network)


class CompiledBlocks:
    """All blocks of one network over a cache. An adapter that acts has a compilation of its own, for nothing else tells them apart."""

    def __init__(self, layers: int) -> None:
        self.options: dict[str, Any] = {
            "guard_filter_fn": lambda guards: [g.guard_type == "SHAPE_ENV" or g.name in ("L['x']", "x") for g in guards],
            "size_asserts": False,
        }
        self.made: dict[Any, Any] = {}
        self.together = next(n for n in range(TOGETHER, 0, -1) if layers % n == 0)  # no graph is made for a rest

    def __call__(
        self, network: Transformer, x: Tensor, cos: Tensor, sin: Tensor, memory: Memory, span: tuple[int, int], mask: Tensor | None
    ) -> Tensor:
        """x after them, new positions in this span of the memory."""
        adapter = network.adapter if network.adapter is not None and network.adapter.masks_M is not None else None
        if adapter not in self.made:
            self.made[adapter] = torch.compile(_own(_over), fullgraph=True, options=self.options)
        kept, slot_Q, mask_B1QT = memory.whole(*span, mask)
        cos, sin = (turn.expand(len(x), -1, -1, -1).contiguous() for turn in (cos, sin))  # of one layout, which is not checked either
        torch._dynamo.mark_dynamic(mask_B1QT, 3)  # one compilation for memories of any length
        if x.shape[1] > 1:  # and for any number of positions, which guards of x hold together
            gates = [] if adapter is None else [(adapter.gate_BQ1, 1)]
            for tensor, axis in [(x, 1), (cos, 2), (sin, 2), (slot_Q, 0), (mask_B1QT, 2), *gates]:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        for tensor in itertools.chain.from_iterable(kept):
            if not hasattr(tensor, "_dynamo_dynamic_indices"):
                torch._dynamo.mark_dynamic(tensor, 2)
        blocks = list(network.blocks)
        for first in range(0, len(blocks), self.together):
            some = slice(first, first + self.together)
            x = self.made[adapter](blocks[some], x, cos, sin, kept[some], slot_Q, mask_B1QT)
        return x


def _over(
    blocks: Sequence[Block], x: Tensor, cos: Tensor, sin: Tensor, kept: Sequence[tuple[Tensor, Tensor]], slot_Q: Tensor, mask_B1QT: Tensor
) -> Tensor:
    for block, own in zip(blocks, kept, strict=True):
        x = block.over(x, cos, sin, own, slot_Q, mask_B1QT)
    return x


def _own(function: Any) -> Any:
    """A copy with code of its own, by which torch.compile knows it: another network must not find what was compiled for this one."""
    return types.FunctionType(function.__code__.replace(co_name=function.__name__), function.__globals__)
