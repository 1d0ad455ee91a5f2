"""Cache policies: which positions of a window a forward pass reads anew, the others being cached.

`Exact` is exact for block-causal networks, `CausalText` for those that read the text before a block causally. The others approximate: they
are for bidirectional networks, where every key and value changes with every token, and leave some of these changes out.
Shapes: B rows, T positions of the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.errors import InputError, in_range, unknown
from dlm.sampling.diffusion.protocols import CachePolicy, View
from dlm.sampling.draw import MAX_SETTING


def _unread(view: View) -> Tensor:
    """bool (B, 1): rows in which some position was never read."""
    return (view.seen_BT < 0).any(-1, keepdim=True)


def _begin(view: View) -> Tensor:
    """int64 (B, 1): the first position of the block."""
    return view.block_BT.int().argmax(-1, keepdim=True)


def _blocks(view: View, length: int) -> tuple[Tensor, Tensor]:
    """The number of the block that each position is in (B, T), the first one 0, whole or not; and of the one that is worked on (B, 1)."""
    pos_T = torch.arange(view.z_BT.shape[1], device=view.z_BT.device)
    number_BT = (pos_T - view.phase_B[:, None]).div(length, rounding_mode="floor")
    number_BT = number_BT - number_BT[:, :1]
    return number_BT, number_BT.gather(1, _begin(view))


@dataclass(frozen=True)
class Exact:
    """For a block-causal network: the block that is worked on, and blocks before it whose text changed since they were read."""

    block_length: int

    def __post_init__(self) -> None:
        in_range(self.block_length, 1, MAX_SETTING, "the block length")

    def __call__(self, view: View) -> Tensor:
        number_BT, here_B1 = _blocks(view, self.block_length)
        stale_BT = view.seen_BT != view.z_BT
        stale_BN = torch.zeros_like(number_BT).scatter_add(1, number_BT, stale_BT.long()) > 0
        return (number_BT == here_B1) | (number_BT < here_B1) & stale_BN.gather(1, number_BT)


@dataclass(frozen=True)
class CausalText:
    """For a network that reads the text causally and one block after it fully: the block, and the position before it.

    The row before predicts the first token. When a block begins, the one before it is read once more: it was read fully, and is text now.
    """

    block_length: int

    def __post_init__(self) -> None:
        in_range(self.block_length, 1, MAX_SETTING, "the block length")

    def __call__(self, view: View) -> Tensor:
        number_BT, here_B1 = _blocks(view, self.block_length)
        stale_BT = (view.seen_BT != view.z_BT) | view.entered_B[:, None] & (number_BT == here_B1 - 1)
        in_block_BT = number_BT == here_B1
        before_BT = torch.cat([in_block_BT[:, 1:], torch.zeros_like(in_block_BT[:, :1])], 1) & ~in_block_BT
        return in_block_BT | before_BT | (number_BT < here_B1) & stale_BT


@dataclass(frozen=True)
class Prefix:
    """Everything when a block begins, then all from the block on (Fast-dLLM, Wu et al. 2505.22618, prefix cache)."""

    def __call__(self, view: View) -> Tensor:
        pos_T = torch.arange(view.z_BT.shape[1], device=view.z_BT.device)
        return view.entered_B[:, None] | _unread(view) | (pos_T >= _begin(view))


@dataclass(frozen=True)
class Dual:
    """Everything when a block begins, then the masks of the block and its new tokens (Fast-dLLM, dual cache)."""

    def __call__(self, view: View) -> Tensor:
        return view.entered_B[:, None] | _unread(view) | view.block_BT | (view.seen_BT != view.z_BT)


@dataclass(frozen=True)
class Delayed:
    """Every mask, and a written token once more in the pass after it; everything in every `refresh` passes (dKV-Cache, 2505.15781)."""

    refresh: int = 8

    def __post_init__(self) -> None:
        in_range(self.refresh, 1, MAX_SETTING, "the forward passes after which a delayed cache is refreshed")

    def __call__(self, view: View) -> Tensor:
        again_B1 = (view.age_B + 1 >= self.refresh)[:, None]
        return again_B1 | _unread(view) | view.hole_BT | (view.seen_BT != view.z_BT)


@dataclass(frozen=True)
class Drift:
    """The block, its new tokens, and a few probes; everything once the values at the probes have moved by more than `threshold`.

    After Elastic-Cache (Nguyen-Tri et al. 2510.14973), which watches attention weights, layer by layer. Probes are the positions
    around the block, whose values depend on it most.
    """

    threshold: float = 0.1
    probes: int = 8

    def __post_init__(self) -> None:
        in_range(self.threshold, 0, MAX_SETTING, "the relative drift that a cache allows")
        in_range(self.probes, 0, MAX_SETTING, "the probes of a cache")

    def __call__(self, view: View) -> Tensor:
        pos_T = torch.arange(view.z_BT.shape[1], device=view.z_BT.device)
        end_B1 = view.z_BT.shape[1] - 1 - view.block_BT.flip(-1).int().argmax(-1, keepdim=True)
        near_BT = (pos_T >= _begin(view) - self.probes // 2) & (pos_T <= end_B1 + self.probes // 2)
        settled_BT = near_BT & ~view.block_BT & (view.seen_BT == view.z_BT)
        moved_B1 = view.drift_BT.masked_fill(~settled_BT, 0.0).amax(-1, keepdim=True) > self.threshold
        return _unread(view) | moved_B1 & (view.age_B > 0)[:, None] | near_BT | view.block_BT | (view.seen_BT != view.z_BT)


@dataclass(frozen=True)
class BeforeToo:
    """Another policy for a network whose row i predicts token i + 1: the positions before those of the block are read anew as well."""

    inner: CachePolicy

    def __call__(self, view: View) -> Tensor:
        before_BT = torch.cat([view.block_BT[:, 1:], torch.zeros_like(view.block_BT[:, :1])], 1)
        return self.inner(view) | view.block_BT | before_BT


POLICIES: dict[str, Callable[..., CachePolicy]] = {"prefix": Prefix, "dual": Dual, "delayed": Delayed, "drift": Drift}
SETTING: dict[str, Callable[[str], float]] = {"delayed": int, "drift": float}


def make(word: str) -> CachePolicy:
    """The policy that a word such as `dual` or `delayed:8` means. InputError for one that is unknown."""
    name, colon, value = word.partition(":")
    if name not in POLICIES:
        raise unknown("cache", name, POLICIES)
    if colon and name not in SETTING:
        raise InputError(f"the cache {name!r} has no setting, got {word!r}")
    try:
        return POLICIES[name](*([SETTING[name](value)] if colon else []))
    except ValueError:
        raise InputError(f"cache {word!r}: {value!r} is no number that it can use") from None
