"""Any-order speculative decoding: many tokens a forward pass, distributed as one a pass in random order.

Shapes: B rows, A rows with masks left, K draft tokens, P pairs of a row and a number of its draft tokens, C = K + 1 positions that are
due, L positions of the canvas, T window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm.errors import in_range
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import time_when
from dlm.protocols import RNG, Denoiser, OwnDraws
from dlm.sampling import rejection, windows
from dlm.sampling.diffusion.columns import Columns
from dlm.sampling.diffusion.network_call import read_at
from dlm.sampling.diffusion.noisy_text import Active, Ends, NoisyText, check_order, described, phase, whole_blocks, width
from dlm.sampling.diffusion.protocols import Constraint, Guidance
from dlm.sampling.draw import MAX_SETTING, Draw, beside, categorical, check_sound, uniform
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
    p, so each is within tolerance / (1 + tolerance) of it in total variation.
    block_length: the order is random within blocks, which come from left to right, as a network that does not see ahead needs it.
    guidance, constraint: p is that of guided logits, and of the tokens that leave a way to fill the rest; q follows.
    The others are as of `DiffusionSampler`. InputError for settings out of range.
    """

    denoiser: Denoiser
    noise: MaskedNoise
    window: int
    draft_tokens: int = 8
    tolerance: float = 0.0
    draw: Draw = field(default_factory=Draw)
    context: int = 0
    model: str = ""
    block_length: int = 0
    guidance: Guidance | None = None
    constraint: Constraint | None = None
    sees_ahead: bool = True
    fills_window: bool = True
    block_phase: str = "zero"
    stops: frozenset[int] = frozenset()
    ends: Ends = "text"

    def __post_init__(self) -> None:
        in_range(self.draft_tokens, 1, MAX_DRAFT_TOKENS, "the draft tokens of a forward pass")
        in_range(self.tolerance, 0, MAX_SETTING, "the tolerance")
        in_range(self.block_length, 0, self.window, "the block length")
        windows.check(self.window, self.context)

    @torch.no_grad()
    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every forward pass, whose batch has up to `draft_tokens` rows for each row of the canvas. rng: one a row."""
        if not self.sees_ahead:
            check_order(canvas, self.block_length, self.block_phase)
        run = AnyOrderRun(self, canvas, rng)
        while bool(run.text.open_BL.any()):
            yield run.step()

    def log_probs(self, logits_NKV: Tensor) -> Tensor:
        """The distributions that tokens at masks are drawn from, float64. InputError where the network gives none."""
        z_NK = torch.full_like(logits_NKV[..., 0], self.noise.mask_id, dtype=torch.long)
        logp_NKV = self.noise.log_probs(logits_NKV.double(), z_NK)
        check_sound(logp_NKV)  # at temperature 0 the shape would hide it
        return self.draw.shape(logp_NKV)


@dataclass(frozen=True)
class Ahead:
    """The windows of the rows with masks left. ahead_AT: positions in the order of each row, its masks first."""

    active: Active
    rng: RNG
    entered_A: Tensor
    ahead_AT: Tensor


class AnyOrderRun:
    """The state of one run. Of the last verified row it keeps the logits of the next K positions alone, as they were verified."""

    next_logits_BKV: Tensor

    def __init__(self, sampler: AnyOrderSpeculativeSampler, canvas: Canvas, rng: RNG) -> None:
        self.sampler, self.canvas, self.rng, self.forwards = sampler, canvas, list(rng), 0
        rows, device = len(canvas.tokens_BT), canvas.tokens_BT.device
        whole = whole_blocks(sampler.block_length, sampler.block_phase, sees_ahead=sampler.sees_ahead, fills_window=sampler.fills_window)
        window = sampler.window if sampler.fills_window else width(canvas, sampler.window, whole)
        self.text = NoisyText(canvas, sampler.noise, window, phase(canvas, sampler.block_length, sampler.block_phase), rng, whole)
        if not sampler.fills_window:
            self.rng = [OwnDraws.of(g, count) for g, count in zip(rng, self.text.count_B.tolist(), strict=True)]
        self.start_B = torch.full((rows,), -1, device=device)
        self.order_BT = torch.zeros(rows, window, dtype=torch.long, device=device)

    def step(self) -> Frame:
        """One forward pass, which verifies the draft of every row with masks left.

        A row that enters a window has no draft yet, and draws one token.
        """
        sampler, ahead = self.sampler, self._enter()
        active, entered_A = ahead.active, ahead.entered_A
        one_block = getattr(sampler.denoiser, "reads_begin", False)  # a pass reads the text before one block otherwise than the block
        count_A = (active.block_AT if one_block else active.hole_AT).sum(-1).clamp(max=sampler.draft_tokens).masked_fill(entered_A, 1)
        numbers_3AK = torch.stack([uniform(ahead.rng, sampler.draft_tokens) for _ in range(3)])
        draw_AK, test_AK, again_AK = beside(numbers_3AK, count_A)[..., : int(count_A.max())]
        token_AK, q_AKV = self._draft(ahead, draw_AK)
        logits_PCV, row_P, k_P = self._read(ahead, token_AK, count_A)
        p_AKV = torch.zeros_like(q_AKV)
        p_AKV[row_P, k_P] = sampler.log_probs(logits_PCV[:, :1])[:, 0].exp()
        tested_A = count_A.masked_fill(entered_A, 0)
        again_AK = torch.where(entered_A[:, None], draw_AK, again_AK)
        accepted_A, next_A = rejection.verify(p_AKV, q_AKV, token_AK, tested_A, test_AK, again_AK, sampler.tolerance)
        self._keep(ahead, logits_PCV, count_A, accepted_A)
        token_AK = torch.where(_slots(token_AK) == accepted_A[:, None], next_A[:, None], token_AK)
        self._write(ahead, token_AK, torch.minimum(accepted_A + 1, count_A))
        return self.frame()

    def frame(self) -> Frame:
        """The state as it is."""
        settled_BL = self.text.settled_BL
        return Frame(self.text.shown_BL, settled_BL, (~settled_BL).double().mean(-1), self.sampler.model, self.forwards)

    def _enter(self) -> Ahead:
        """The window of every row with masks left, and a new random order for rows that enter theirs."""
        sampler = self.sampler
        active = self.text.active(sampler.context, sampler.block_length, fills_window=sampler.fills_window)
        entered_A = active.start_A != self.start_B[active.rows_A]
        self.start_B[active.rows_A] = active.start_A
        if bool(entered_A.any()):
            entered_B = active.rows_A[entered_A]
            u_AT = beside(uniform([self.rng[b] for b in entered_B.tolist()], self.text.window), active.z_AT)
            order_AT = sampler.noise.revealed_at(u_AT).argsort(-1)
            if sampler.block_length:  # by blocks, and within each as before
                number_AT = (order_AT - active.phase_A[entered_A][:, None]).div(sampler.block_length, rounding_mode="floor")
                order_AT = order_AT.gather(1, number_AT.argsort(dim=-1, stable=True))
            self.order_BT[entered_B] = order_AT
        order_AT = self.order_BT[active.rows_A]
        ahead_AT = order_AT.gather(1, (~active.hole_AT.gather(1, order_AT)).int().argsort(dim=-1, stable=True))
        return Ahead(active, [self.rng[b] for b in active.rows], entered_A, ahead_AT)

    def _draft(self, ahead: Ahead, draw_AK: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens for the next K masks of every row, each drawn by itself, and q."""
        if self.forwards == 0:  # nothing to draw them from yet
            q_AKV = torch.zeros(*draw_AK.shape, self.sampler.noise.vocab_size, dtype=torch.float64, device=draw_AK.device)
            return torch.zeros_like(draw_AK, dtype=torch.long), q_AKV
        logq_AKV = self.sampler.log_probs(self.next_logits_BKV[ahead.active.rows_A, : draw_AK.shape[1]])
        return categorical(logq_AKV, draw_AK), logq_AKV.exp()

    def _read(self, ahead: Ahead, token_AK: Tensor, count_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits of the positions that are due, the row of each pair, its number of draft tokens): the one forward pass.

        Due after k draft tokens are the position of the next and those of the K after it, which the next draft may need.
        """
        active, sampler, ahead_AT, slot_K = ahead.active, self.sampler, ahead.ahead_AT, _slots(token_AK)
        row_P, k_P = (slot_K < count_A[:, None]).nonzero(as_tuple=True)
        z_PT, pos_PK = active.z_AT[row_P], ahead_AT[row_P, : token_AK.shape[1]]
        z_PT = z_PT.scatter(1, pos_PK, torch.where(slot_K < k_P[:, None], token_AK[row_P], z_PT.gather(1, pos_PK)))
        due_C = torch.arange(sampler.draft_tokens + 1, device=k_P.device)
        index_PC = ahead_AT[row_P[:, None], (k_P[:, None] + due_C).clamp(max=ahead_AT.shape[1] - 1)]
        columns = Columns(index_PC, torch.ones_like(index_PC, dtype=torch.bool), ahead_AT.shape[1])
        t_P = time_when(sampler.noise.schedule, (z_PT != sampler.noise.mask_id).double().mean(-1))
        how: dict[str, Tensor] = {}
        if not sampler.fills_window:
            how = described(active, sampler.block_length, sampler.block_phase, sampler.denoiser, sees_ahead=sampler.sees_ahead)

        def read(z_MT: Tensor, t_M: Tensor) -> Tensor:
            times = len(z_MT) // len(row_P)
            more = {name: x_AT[row_P].repeat(times, 1) for name, x_AT in how.items()}
            return read_at(sampler.denoiser, z_MT, t_M, columns.repeat(times), **more)

        logits_PCV = read(z_PT, t_P) if sampler.guidance is None else sampler.guidance(read, z_PT, t_P, active.given_AT[row_P])
        self.forwards += 1
        return self._narrowed(logits_PCV, active, z_PT, row_P, columns), row_P, k_P

    def _narrowed(self, logits_PCV: Tensor, active: Active, z_PT: Tensor, row_P: Tensor, columns: Columns) -> Tensor:
        """The logits without the tokens that leave no way to fill the rest of the text that a pair has read."""
        text, constraint = self.text, self.sampler.constraint
        if constraint is None:
            return logits_PCV
        rows_P, past = active.rows_A[row_P], z_PT.shape[1]
        z_PL, hole_PL, at_PL = text.z_BL[rows_P], text.open_BL[rows_P], active.start_A[row_P][:, None] + columns.index_BC
        place_PT = active.start_A[row_P][:, None] + torch.arange(past, device=z_PT.device)
        z_PL = z_PL.scatter(1, place_PT, z_PT)
        hole_PL = hole_PL & (z_PL == self.sampler.noise.mask_id)
        valid_PL = text.valid_BL[rows_P]
        allowed_PLV = constraint.allowed(z_PL[:, : text.length], hole_PL[:, : text.length], valid_PL)
        allowed_PLV |= ~valid_PL[..., None]
        inside_PC = at_PL < text.length  # past the end nothing is forbidden
        at_PL = at_PL.clamp(max=text.length - 1)
        allowed_PCV = allowed_PLV[torch.arange(len(row_P), device=at_PL.device)[:, None], at_PL]
        open_PC = inside_PC & hole_PL.gather(1, at_PL)
        return logits_PCV.masked_fill(~allowed_PCV & open_PC[..., None], -torch.inf)

    def _keep(self, ahead: Ahead, logits_PCV: Tensor, count_A: Tensor, accepted_A: Tensor) -> None:
        """Keep of the last verified row of each text the logits of the next K masks."""
        last_A = torch.minimum(accepted_A, count_A - 1)
        logits_AKV = logits_PCV[count_A.cumsum(0) - count_A + last_A, 1:]
        if self.forwards == 1:
            self.next_logits_BKV = logits_AKV.new_zeros(len(self.text.z_BL), *logits_AKV.shape[1:])
        self.next_logits_BKV[ahead.active.rows_A] = logits_AKV

    def _write(self, ahead: Ahead, token_AK: Tensor, count_A: Tensor) -> None:
        """Write the first tokens of every row."""
        active = ahead.active
        pos_AK = ahead.ahead_AT[:, : token_AK.shape[1]]
        z_AT = active.z_AT.scatter(1, pos_AK, token_AK)
        written_AT = torch.zeros_like(active.hole_AT).scatter(1, pos_AK, _slots(token_AK) < count_A[:, None])
        self.text.write(active, z_AT, written_AT, written_AT)
        if self.sampler.stops:
            self.text.end(active.rows_A, self.sampler.stops, self.sampler.ends, self.sampler.block_length)


def _slots(token_AK: Tensor) -> Tensor:
    return torch.arange(token_AK.shape[1], device=token_AK.device)
