"""Any-order speculative decoding: many tokens a forward pass, distributed as one a pass in random order.

Shapes: B rows, A rows with masks left, K draft tokens, P pairs of a row and a number of its draft tokens, L positions of the canvas,
T window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm.errors import InputError, in_range
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import time_when
from dlm.protocols import RNG, Denoiser
from dlm.sampling import rejection, windows
from dlm.sampling.draw import MAX_SETTING, Draw, beside, categorical, uniform
from dlm.trajectory import Canvas, Frame

MAX_DRAFT_TOKENS = 256
"""Draft tokens of a row at most; one forward pass reads a window for each."""


@dataclass(frozen=True)
class AnyOrderSpeculativeSampler:
    """Draft the next `draft_tokens` tokens of a random order independently, verify them in one batched forward pass.

    Row k of that pass sees the first k draft tokens and gives p of the next; `rejection.verify` accepts or replaces it. So the
    distribution is that of decoding one token a forward pass in random order, for every q, and a pass never yields less than one
    token. The next draft is drawn from the last verified row, which misses one token at most.
    tolerance: accept with min(1, (1 + tolerance) p / q) instead; no token is then more than 1 + tolerance times as likely as under
    p, so each is within tolerance / (1 + tolerance) of it in total variation. InputError for settings out of range.
    """

    denoiser: Denoiser
    noise: MaskedNoise
    window: int
    draft_tokens: int = 8
    tolerance: float = 0.0
    draw: Draw = field(default_factory=Draw)
    context: int = 0
    model: str = ""

    def __post_init__(self) -> None:
        in_range(self.draft_tokens, 1, MAX_DRAFT_TOKENS, "the draft tokens of a forward pass")
        in_range(self.tolerance, 0, MAX_SETTING, "the tolerance")
        windows.check(self.window, self.context)

    @torch.no_grad()
    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every forward pass, whose batch has up to `draft_tokens` rows for each row of the canvas. rng: one a row."""
        run = AnyOrderRun(self, canvas, rng)
        while bool(run.open_BL.any()):
            yield run.step()

    def log_probs(self, logits_NKV: Tensor) -> Tensor:
        """The distributions that tokens at masks are drawn from, float64. InputError where the network gives none."""
        z_NK = torch.full_like(logits_NKV[..., 0], self.noise.mask_id, dtype=torch.long)
        logp_NKV = self.draw.shape(self.noise.log_probs(logits_NKV.double(), z_NK))
        if bool(logp_NKV.isnan().any()):
            raise InputError("the model gives no probabilities (nan): its weights are broken")
        return logp_NKV


@dataclass(frozen=True)
class Active:
    """The windows of the rows with masks left. ahead_AT: positions in the order of each row, its masks first."""

    rows_A: Tensor
    rng: RNG
    start_A: Tensor
    entered_A: Tensor
    z_AT: Tensor
    open_AT: Tensor
    ahead_AT: Tensor


class AnyOrderRun:
    """The state of one run. Of the last verified row it keeps the logits of the next K positions alone, as the network gave them."""

    next_logits_BKV: Tensor

    def __init__(self, sampler: AnyOrderSpeculativeSampler, canvas: Canvas, rng: RNG) -> None:
        (rows, window), mask_id, device = (len(canvas.tokens_BT), sampler.window), sampler.noise.mask_id, canvas.tokens_BT.device
        past_BL = torch.zeros(rows, window, dtype=torch.bool, device=device)
        self.sampler, self.canvas, self.rng, self.forwards = sampler, canvas, rng, 0
        self.open_BL = torch.cat([canvas.free_BT, past_BL], 1)
        z_BL = torch.where(canvas.given_BT, canvas.tokens_BT, mask_id)
        self.z_BL = torch.cat([z_BL, torch.full_like(past_BL, mask_id, dtype=torch.long)], 1)
        self.start_B = torch.full((rows,), -1, device=device)
        self.order_BT = torch.zeros(rows, window, dtype=torch.long, device=device)

    def step(self) -> Frame:
        """One forward pass, which verifies the draft of every row with masks left.

        A row that enters a window has no draft yet, and draws one token.
        """
        sampler, active = self.sampler, self._enter()
        count_A = active.open_AT.sum(-1).clamp(max=sampler.draft_tokens).masked_fill(active.entered_A, 1)
        numbers_3AK = torch.stack([uniform(active.rng, sampler.draft_tokens) for _ in range(3)])
        draw_AK, test_AK, again_AK = beside(numbers_3AK, count_A)[..., : int(count_A.max())]
        token_AK, q_AKV = self._draft(active, draw_AK)
        logits_PTV, row_P, k_P = self._read(active, token_AK, count_A)
        pair_P = torch.arange(len(row_P), device=row_P.device)
        p_AKV = torch.zeros_like(q_AKV)
        p_AKV[row_P, k_P] = sampler.log_probs(logits_PTV[pair_P, active.ahead_AT[row_P, k_P]][:, None])[:, 0].exp()
        tested_A = count_A.masked_fill(active.entered_A, 0)
        again_AK = torch.where(active.entered_A[:, None], draw_AK, again_AK)
        accepted_A, next_A = rejection.verify(p_AKV, q_AKV, token_AK, tested_A, test_AK, again_AK, sampler.tolerance)
        self._keep(active, logits_PTV, count_A, accepted_A)
        token_AK = torch.where(_slots(token_AK) == accepted_A[:, None], next_A[:, None], token_AK)
        self._write(active, token_AK, torch.minimum(accepted_A + 1, count_A))
        return self.frame()

    def frame(self) -> Frame:
        """The state as it is."""
        length = self.canvas.tokens_BT.shape[1]
        tokens_BL = torch.where(self.canvas.valid_BT, self.z_BL[:, :length], self.canvas.tokens_BT)
        open_BL = self.open_BL[:, :length]
        return Frame(tokens_BL, ~open_BL, open_BL.double().mean(-1), self.sampler.model, self.forwards)

    def _enter(self) -> Active:
        """The window of every row with masks left, and a new random order for rows that enter theirs."""
        window, live = self.sampler.window, self.open_BL.any(-1).tolist()
        rows, device = [b for b, one in enumerate(live) if one], self.open_BL.device
        rows_A = torch.arange(len(live), device=device) if all(live) else torch.tensor(rows, device=device)
        start_A = windows.start(self.open_BL[rows_A], window, self.sampler.context)
        z_AT, open_AT = (windows.take(x_BL[rows_A], start_A, window) for x_BL in (self.z_BL, self.open_BL))
        entered_A = start_A != self.start_B[rows_A]
        self.start_B[rows_A] = start_A
        if bool(entered_A.any()):
            entered_B = rows_A[entered_A]
            self.order_BT[entered_B] = beside(uniform([self.rng[b] for b in entered_B.tolist()], window), z_AT).argsort(-1)
        order_AT = self.order_BT[rows_A]
        ahead_AT = order_AT.gather(1, (~open_AT.gather(1, order_AT)).int().argsort(dim=-1, stable=True))
        return Active(rows_A, [self.rng[b] for b in rows], start_A, entered_A, z_AT, open_AT, ahead_AT)

    def _draft(self, active: Active, draw_AK: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens for the next K masks of every row, each drawn by itself, and q."""
        if self.forwards == 0:  # nothing to draw them from yet
            q_AKV = torch.zeros(*draw_AK.shape, self.sampler.noise.vocab_size, dtype=torch.float64, device=draw_AK.device)
            return torch.zeros_like(draw_AK, dtype=torch.long), q_AKV
        logq_AKV = self.sampler.log_probs(self.next_logits_BKV[active.rows_A, : draw_AK.shape[1]])
        return categorical(logq_AKV, draw_AK), logq_AKV.exp()

    def _read(self, active: Active, token_AK: Tensor, count_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits of the positions that are due, the row of each pair, its number of draft tokens): the one forward pass.

        Due after k draft tokens are the position of the next and those of the K after it, which the next draft may need.
        """
        z_AT, ahead_AT, slot_K = active.z_AT, active.ahead_AT, _slots(token_AK)
        row_P, k_P = (slot_K < count_A[:, None]).nonzero(as_tuple=True)
        pos_PK = ahead_AT[row_P, : token_AK.shape[1]]
        z_PT = z_AT[row_P].scatter(1, pos_PK, torch.where(slot_K < k_P[:, None], token_AK[row_P], z_AT[row_P].gather(1, pos_PK)))
        rank_T = torch.arange(ahead_AT.shape[1], device=k_P.device)
        due_PT = (rank_T >= k_P[:, None]) & (rank_T <= k_P[:, None] + self.sampler.draft_tokens)
        at_PT = torch.zeros_like(due_PT).scatter(1, ahead_AT[row_P], due_PT)
        t_P = time_when(self.sampler.noise.schedule, (z_PT != self.sampler.noise.mask_id).double().mean(-1))
        self.forwards += 1
        return self.sampler.denoiser(z_PT, t_P, at_BQ=at_PT), row_P, k_P

    def _keep(self, active: Active, logits_PTV: Tensor, count_A: Tensor, accepted_A: Tensor) -> None:
        """Keep of the last verified row of each text the logits of the next K masks."""
        last_A = torch.minimum(accepted_A, count_A - 1)
        slot_K = torch.arange(self.sampler.draft_tokens, device=last_A.device)
        pos_AK = active.ahead_AT.gather(1, (last_A[:, None] + 1 + slot_K).clamp(max=active.ahead_AT.shape[1] - 1))
        pair_A = count_A.cumsum(0) - count_A + last_A
        logits_AKV = logits_PTV[pair_A[:, None], pos_AK]
        if self.forwards == 1:
            self.next_logits_BKV = logits_AKV.new_zeros(len(self.z_BL), *logits_AKV.shape[1:])
        self.next_logits_BKV[active.rows_A] = logits_AKV

    def _write(self, active: Active, token_AK: Tensor, count_A: Tensor) -> None:
        """Write the first tokens of every row."""
        pos_AK = active.ahead_AT[:, : token_AK.shape[1]]
        z_AT = active.z_AT.scatter(1, pos_AK, token_AK)
        written_AT = torch.zeros_like(active.open_AT).scatter(1, pos_AK, _slots(token_AK) < count_A[:, None])
        windows.put(self.z_BL, active.rows_A, active.start_A, z_AT, written_AT)
        windows.put(self.open_BL, active.rows_A, active.start_A, torch.zeros_like(written_AT), written_AT)


def _slots(token_AK: Tensor) -> Tensor:
    return torch.arange(token_AK.shape[1], device=token_AK.device)
