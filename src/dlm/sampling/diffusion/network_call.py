"""The forward pass of a diffusion step: whole windows, guided, with shadows, or against a cache.

Shapes: B rows, A rows of this pass, T positions of the window, Q positions read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.protocols import Denoiser
from dlm.sampling.batching import stacked
from dlm.sampling.diffusion.noisy_text import Active
from dlm.sampling.diffusion.protocols import CachePolicy, CheckingRule, Guidance, Rule, View

HALF_PRECISION = (torch.bfloat16, torch.float16)
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class NetworkCall:
    """Remembers the token that was last read at each position, and so the positions that a cache still holds.

    InputError for parts that do not combine.

    like_BT: any tensor with the rows, the window and the device of the run.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        mask_id: int,
        like_BT: Tensor,
        rule: Rule,
        policy: CachePolicy | None,
        make_cache: Callable[[int], Any] | None,
        guidance: Guidance | None,
    ) -> None:
        self.denoiser, self.mask_id, self.policy, self.guidance = denoiser, mask_id, policy, guidance
        self.shadow = isinstance(rule, CheckingRule)
        if sum([self.shadow, policy is not None, guidance is not None]) > 1:
            raise InputError("a cache, guidance and a sampler that checks what it wrote cannot be combined: leave all but one away")
        if policy is not None and make_cache is None:
            raise InputError("this model has no cache for windows")
        self.cache = make_cache(len(like_BT)) if policy is not None and make_cache is not None else None
        self.seen_BT = torch.full_like(like_BT, -1, dtype=torch.long)
        self.age_B, self.start_B = torch.zeros_like(self.seen_BT[:, 0]), self.seen_BT[:, 0].clone()

    def join(self, other: NetworkCall) -> None:
        """Take in the rows of another of the same kind."""
        for name in ("seen_BT", "age_B", "start_B"):
            setattr(self, name, stacked(getattr(self, name), getattr(other, name), -1))
        if self.cache is not None:
            self.cache.join(other.cache)

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        for name in ("seen_BT", "age_B", "start_B"):
            setattr(self, name, getattr(self, name)[rows_K])
        if self.cache is not None:
            self.cache.keep(rows_K)

    def __call__(
        self, active: Active, entered_A: Tensor, t_A: Tensor, due_AT: Tensor | None, described: Mapping[str, Tensor] = NOTHING
    ) -> tuple[Tensor, Tensor | None]:
        """(logits_ATV, shadow_ATV or None) of the active windows.

        entered_A: rows that begin a block. due_AT: the only positions whose logits matter, where no logit decides which; logits of
        positions that were not read are 0. described: further arguments of the network, tensors of the rows A. InputError for windows that
        a rule which checks its text cannot read.
        """
        z_AT = active.z_AT
        if self.policy is not None:
            return self._cached(active, entered_A, t_A), None
        if self.guidance is not None:
            return self.guidance(partial(self._several, described), z_AT, t_A, active.given_AT), None
        if not self.shadow:
            return self._read(z_AT, t_A, **described) if due_AT is None else self._read(z_AT, t_A, at_BQ=due_AT, **described), None
        if described:
            raise InputError("a sampler that checks what it wrote needs rows of one length, in blocks from zero: generate them one by one")
        logits_AQV = self._read(torch.cat([z_AT, torch.full_like(z_AT, self.mask_id)], 1), t_A, pattern="shadow")
        return logits_AQV[:, : z_AT.shape[1]], logits_AQV[:, z_AT.shape[1] :]

    def _several(self, described: Mapping[str, Tensor], z_MQ: Tensor, t_M: Tensor) -> Tensor:
        """`_read` of a batch in which the rows A stand one or more times, one after another."""
        return self._read(z_MQ, t_M, **{name: x_A.repeat(len(z_MQ) // len(x_A), 1) for name, x_A in described.items()})

    def _read(self, z_AQ: Tensor, t_A: Tensor, **how: Any) -> Tensor:
        """Logits in float32 at least: in bf16 probabilities of a large vocabulary do not sum to 1."""
        logits_AQV = self.denoiser(z_AQ, t_A, **how)
        return logits_AQV.float() if logits_AQV.dtype in HALF_PRECISION else logits_AQV

    def _cached(self, active: Active, entered_A: Tensor, t_A: Tensor) -> Tensor:
        """Logits of the positions that the policy reads anew, against keys and values of the others."""
        assert self.policy is not None
        assert self.cache is not None
        rows_A, start_A, z_AT, block_AT = active.rows_A, active.start_A, active.z_AT, active.block_AT
        window, moved_A = z_AT.shape[1], rows_A[self.start_B[rows_A] != start_A]
        self.cache.clear(moved_A)
        self.seen_BT[moved_A], self.start_B[rows_A] = -1, start_A
        known = self.seen_BT[rows_A], entered_A, self.age_B[rows_A], self.cache.drift_BT[rows_A]
        read_AT = self.policy(View(z_AT, active.hole_AT, block_AT, *known)) | block_AT
        count_A = read_AT.sum(-1)
        order_AQ = read_AT.int().argsort(dim=-1, descending=True, stable=True)[:, : int(count_A.max())]
        # rows that read less than the longest fill up with a position whose logits are not used
        real_AQ = torch.arange(order_AQ.shape[1], device=z_AT.device) < count_A[:, None]
        pos_AQ = torch.where(real_AQ, order_AQ, window)
        token_AQ = torch.where(real_AQ, z_AT.gather(1, order_AQ), self.mask_id)
        logits_AQV = self._read(token_AQ, t_A, pos_BQ=pos_AQ, cache=self.cache.of(rows_A))
        self.seen_BT[rows_A] = torch.where(read_AT, z_AT, self.seen_BT[rows_A])
        self.age_B[rows_A] = torch.where(read_AT.all(-1), 0, self.age_B[rows_A] + 1)
        logits_ATV = logits_AQV.new_zeros(len(z_AT), window + 1, logits_AQV.shape[-1])
        logits_ATV.scatter_(1, pos_AQ[..., None].expand_as(logits_AQV), logits_AQV)
        return logits_ATV[:, :window]
