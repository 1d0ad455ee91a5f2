"""The forward pass of a diffusion step: whole windows, guided, with shadows, or against caches.

Shapes: B rows, A rows of this pass, M of one or several batches of them, T positions of the window, C columns, Q positions read,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.protocols import Denoiser, PickingDenoiser
from dlm.sampling.batching import stacked
from dlm.sampling.diffusion.columns import Columns
from dlm.sampling.diffusion.noisy_text import Active
from dlm.sampling.diffusion.protocols import Cache, CachePolicy, CheckingRule, Guidance, Rule, View

HALF_PRECISION = (torch.bfloat16, torch.float16)
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
Read = Callable[[Tensor, Tensor], Tensor]
"""The network: (z_MT, t_M) -> logits (M, T or C, V)."""


def read_at(denoiser: Denoiser, z_BQ: Tensor, t_B: Tensor, columns: Columns | None, **how: Any) -> Tensor:
    """Logits (B, C, V) of these columns, or (B, Q, V) of all positions.

    In float32 at least: in bf16 probabilities of a large vocabulary do not sum to 1.
    """
    if columns is None:
        logits = denoiser(z_BQ, t_B, **how)
    elif isinstance(denoiser, PickingDenoiser) and denoiser.picks:
        logits = denoiser(z_BQ, t_B, index_BC=columns.index_BC, **how)
    else:
        logits = columns.take(denoiser(z_BQ, t_B, at_BQ=columns.at_BT, **how))
    return logits.float() if logits.dtype in HALF_PRECISION else logits


class NetworkCall:
    """Remembers the token that was last read at each position, and so the positions that a cache still holds.

    InputError for parts that do not combine.

    like_BT: any tensor with the rows, the window and the device of the run. make_cache: an empty `Cache` of so many rows and positions.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        mask_id: int,
        like_BT: Tensor,
        rule: Rule,
        policy: CachePolicy | None,
        make_cache: Callable[[int, int], Cache] | None,
        guidance: Guidance | None,
    ) -> None:
        self.denoiser, self.mask_id, self.policy, self.guidance = denoiser, mask_id, policy, guidance
        self.shadow = isinstance(rule, CheckingRule)
        if self.shadow and (policy is not None or guidance is not None):
            raise InputError("a sampler that checks what it wrote cannot be combined with a cache or guidance: leave all but one away")
        if policy is not None and make_cache is None:
            raise InputError("this model has no cache for windows")
        count = 0 if policy is None else 1 if guidance is None else 2  # with guidance, one of texts without their prompts
        rows, window = like_BT.shape
        self.caches = [make_cache(rows, window) for _ in range(count)] if make_cache is not None else []
        self.seen_BT = torch.full_like(like_BT, -1, dtype=torch.long)
        self.age_B, self.start_B = torch.zeros_like(self.seen_BT[:, 0]), self.seen_BT[:, 0].clone()

    def join(self, other: NetworkCall) -> None:
        """Take in the rows of another of the same kind."""
        for name in ("seen_BT", "age_B", "start_B"):
            setattr(self, name, stacked(getattr(self, name), getattr(other, name), -1))
        for one, two in zip(self.caches, other.caches, strict=True):
            one.join(two)

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        for name in ("seen_BT", "age_B", "start_B"):
            setattr(self, name, getattr(self, name)[rows_K])
        for cache in self.caches:
            cache.keep(rows_K)

    def __call__(
        self, active: Active, entered_A: Tensor, t_A: Tensor, columns: Columns | None, described: Mapping[str, Tensor] = NOTHING
    ) -> tuple[Tensor, Tensor | None]:
        """(logits, shadow_ATV or None) of the active windows: (A, C, V) at these columns, without columns (A, T, V).

        entered_A: rows that begin a block. Without columns, logits of positions that were not read are 0. described: further arguments
        of the network, tensors of the rows A. InputError for windows that a rule which checks its text cannot read.
        """
        z_AT = active.z_AT
        if self.shadow:
            return self._with_shadow(z_AT, t_A, described)
        if self.policy is None:
            read: Read = partial(self._whole, columns, described)
        else:
            read = partial(self._over_caches, active.rows_A, self._anew(active, entered_A, self.policy, described), columns, described)
        if self.guidance is None:
            return read(z_AT, t_A), None
        return self.guidance(read, z_AT, t_A, active.given_AT), None

    def _with_shadow(self, z_AT: Tensor, t_A: Tensor, described: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if described.keys() - {"valid_BT"}:
            raise InputError("a sampler that checks what it wrote needs blocks from zero: leave --block-length away")
        both_AQ = torch.cat([z_AT, torch.full_like(z_AT, self.mask_id)], 1)
        logits_AQV = read_at(self.denoiser, both_AQ, t_A, None, pattern="shadow", **described)
        return logits_AQV[:, : z_AT.shape[1]], logits_AQV[:, z_AT.shape[1] :]

    def _whole(self, columns: Columns | None, described: Mapping[str, Tensor], z_MT: Tensor, t_M: Tensor) -> Tensor:
        """Logits of a batch in which the rows A stand one or more times, one after another."""
        if columns is not None and "valid_BT" in described:  # nothing is read that stands after every text
            width = int(described["valid_BT"].any(0).nonzero()[-1]) + 1
            z_MT, described = z_MT[:, :width], {name: x_A[:, :width] for name, x_A in described.items()}
            if bool(described["valid_BT"].all()):
                described.pop("valid_BT")
        if described or columns is not None:
            rows = len(next(iter(described.values()))) if columns is None else len(columns.index_BC)
            times = len(z_MT) // rows
            described = {name: x_A.repeat(times, 1) for name, x_A in described.items()}
            columns = None if columns is None else columns.repeat(times)
        return read_at(self.denoiser, z_MT, t_M, columns, **described)

    def _anew(self, active: Active, entered_A: Tensor, policy: CachePolicy, described: Mapping[str, Tensor]) -> Tensor:
        """The positions that this pass reads anew, bool (A, T), none of them past the end of a text that does not fill its window."""
        rows_A, start_A, z_AT, block_AT = active.rows_A, active.start_A, active.z_AT, active.block_AT
        moved_A = rows_A[self.start_B[rows_A] != start_A]
        for cache in self.caches:
            cache.clear(moved_A)
        self.seen_BT[moved_A], self.start_B[rows_A] = -1, start_A
        seen_AT, beyond_AT = self.seen_BT[rows_A], torch.zeros_like(block_AT)
        if "valid_BT" in described:
            beyond_AT = ~described["valid_BT"]
            seen_AT = torch.where(beyond_AT, z_AT, seen_AT)  # there is nothing to read
            for cache in self.caches:
                cache.hide(rows_A, beyond_AT)
        known = seen_AT, entered_A, self.age_B[rows_A], self.caches[0].drift_BT[rows_A], active.phase_A
        read_AT = (policy(View(z_AT, active.hole_AT, block_AT, *known)) | block_AT) & ~beyond_AT
        self.seen_BT[rows_A] = torch.where(read_AT, z_AT, seen_AT)
        self.age_B[rows_A] = torch.where((read_AT | beyond_AT).all(-1), 0, self.age_B[rows_A] + 1)
        return read_AT

    def _over_caches(
        self, rows_A: Tensor, read_AT: Tensor, columns: Columns | None, described: Mapping[str, Tensor], z_MT: Tensor, t_M: Tensor
    ) -> Tensor:
        """Logits against keys and values of the positions that are not read anew; texts without their prompts have a cache of their own."""
        reads, window = Columns.of(read_AT), read_AT.shape[1]
        slot_AQ = torch.where(reads.real_BC, reads.index_BC, window)  # rows that read less than the longest fill up past the window
        begin_A = described["pos_BQ"][:, 0] if "pos_BQ" in described else None
        pos_AQ = slot_AQ if begin_A is None else slot_AQ + begin_A[:, None]
        inner = None if columns is None else columns.among(read_AT)
        block = {"begin_B1": described["begin_B1"]} if "begin_B1" in described else {}
        found: list[Tensor] = []
        for cache, z_AT, t_A in zip(self.caches, z_MT.split(len(rows_A)), t_M.split(len(rows_A)), strict=False):
            token_AQ = torch.where(reads.real_BC, reads.take(z_AT), self.mask_id)
            logits = read_at(self.denoiser, token_AQ, t_A, inner, pos_BQ=pos_AQ, cache=cache.of(rows_A, begin_A), **block)
            if columns is None:
                whole_ATV = logits.new_zeros(len(z_AT), window + 1, logits.shape[-1])
                logits = whole_ATV.scatter_(1, slot_AQ[..., None].expand_as(logits), logits)[:, :window]
            found.append(logits)
        return torch.cat(found) if len(found) > 1 else found[0]
