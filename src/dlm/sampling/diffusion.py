"""The one loop for diffusion samplers: every row has its own window, clock and generator.

Rules that unmask write each position once, and it is settled then. Rules that revise (`dlm.sampling.revising`) may write every
open position in every step, and all are settled when the window ends.
Shapes: B rows, A rows that still have something to do, L positions of the canvas, T of the window, V vocabulary, N steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.protocols import RNG, Denoiser, NoiseProcess, PlannedRule, Rule, Step
from dlm.sampling import windows
from dlm.sampling.draw import uniform
from dlm.sampling.rules import Ancestral
from dlm.trajectory import Canvas, Frame


@dataclass(frozen=True)
class DiffusionSampler:
    """Fill a canvas window by window, `budget` steps for each, equally spaced in time.

    until_settled: end a window once no token has changed for so many steps; 0 takes all of them.
    """

    denoiser: Denoiser
    noise: NoiseProcess
    window: int
    rule: Rule = field(default_factory=Ancestral)
    budget: int = 256
    context: int = 0
    model: str = ""
    until_settled: int = 0

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise InputError(f"steps must be at least 1, got {self.budget}")
        if self.until_settled < 0 or (self.until_settled and not self.revises):
            raise InputError("until_settled counts steps from 1, and needs a sampler that revises what it wrote")
        windows.check(self.window, self.context)

    @property
    def revises(self) -> bool:
        """Whether the rule may change a token again."""
        return self.rule.revises

    def _start(self, canvas: Canvas, rng: RNG) -> Tensor:
        """Noise at the free positions, on the padding and for a window past the end: all that a window can show."""
        masked, (rows, length) = isinstance(self.noise, MaskedNoise), canvas.tokens_BT.shape
        z_BL = torch.full((rows, length + self.window), self.noise.mask_id, device=canvas.tokens_BT.device)
        for b in range(rows) if not masked else ():  # as many draws as the row is long, whatever its neighbours are
            count = int(canvas.valid_BT[b].sum()) + self.window
            z_BL[b, :count] = self.noise.prior(uniform(rng[b : b + 1], count).to(z_BL.device))[0]
        given_BL = canvas.valid_BT & ~canvas.free_BT
        z_BL[:, :length] = torch.where(given_BL, canvas.tokens_BT, z_BL[:, :length])
        return z_BL

    @torch.no_grad()
    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every network call; for replacement noise one more before the first, the noise itself. rng: one a row."""
        noise, device, (rows, length) = self.noise, canvas.tokens_BT.device, canvas.tokens_BT.shape
        masked = isinstance(noise, MaskedNoise)
        z_BL = self._start(canvas, rng)
        past_BL = torch.zeros(rows, self.window, dtype=torch.bool, device=device)
        open_BL = torch.cat([canvas.free_BT, past_BL], 1)
        beyond_BL = torch.cat([~canvas.valid_BT, ~past_BL], 1)  # no part of the text: read as noise, denoised with it unless masked
        grid = torch.linspace(1, 0, self.budget + 1, dtype=torch.float64, device=device)
        alphas_N = noise.schedule.alpha(grid)
        # the chain starts with everything masked: where the schedule ends above 0, what it would have kept is not there
        alphas_N = ((alphas_N - alphas_N[0]) / (1 - alphas_N[0]))[1:]
        start_B = torch.full((rows,), -1, device=device)
        clock_B, still_B, saved_B = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        doubt_B = torch.zeros(rows, dtype=torch.float64, device=device)
        due_BT = torch.zeros(rows, self.window, dtype=torch.long, device=device)
        planned, forwards = isinstance(self.rule, PlannedRule), 0

        def frame(level_B: Tensor) -> Frame:
            adaptive = (saved_B.clone(), doubt_B.clone()) if self.until_settled else (None, None)
            tokens_BL = torch.where(canvas.valid_BT, z_BL[:, :length], canvas.tokens_BT)  # padding is no text
            return Frame(tokens_BL, ~open_BL[:, :length], level_B, self.model, forwards, *adaptive)

        if not masked:
            yield frame(torch.ones(rows, dtype=torch.float64, device=device))
        while bool(open_BL.any()):
            rows_A = open_BL.any(-1).nonzero().squeeze(-1)
            rng_A = [rng[b] for b in rows_A.tolist()]
            start_A = windows.start(open_BL[rows_A], self.window, self.context)
            z_AT, open_AT, beyond_AT = (windows.take(x_BL[rows_A], start_A, self.window) for x_BL in (z_BL, open_BL, beyond_BL))
            entered_A = start_A != start_B[rows_A]  # rows that begin a window
            start_B[rows_A], clock_B[rows_A[entered_A]], still_B[rows_A[entered_A]] = start_A, 0, 0
            if isinstance(self.rule, PlannedRule):
                if bool(entered_A.any()):
                    entered_B = rows_A[entered_A]
                    due_BT[entered_B] = self.rule.due(open_AT[entered_A], alphas_N, [rng[b] for b in entered_B.tolist()])
                # jump to the next step in which something of the row moves
                clock_B[rows_A] = due_BT[rows_A].masked_fill(~open_AT, self.budget).min(-1).values
            clock_A = clock_B[rows_A]
            move_AT = open_AT & (due_BT[rows_A] == clock_A[:, None]) if planned else open_AT
            if self.revises and not masked:
                move_AT = move_AT | beyond_AT
            t_A, s_A = grid[clock_A], grid[clock_A + 1]
            logp_ATV = noise.log_probs(self.denoiser(z_AT, t_A), z_AT, t_A)
            forwards += 1
            next_AT = self.rule(Step(z_AT, move_AT, logp_ATV, t_A, s_A, self.budget - clock_A, self.budget, noise), rng_A)
            if self.revises:
                settled_A = clock_A + 1 == self.budget
                if self.until_settled:
                    quiet_A = ((next_AT == z_AT) | ~open_AT).all(-1)
                    still_B[rows_A] = (still_B[rows_A] + 1) * quiet_A
                    early_A = (still_B[rows_A] >= self.until_settled) & ~settled_A & ((next_AT != noise.mask_id) | ~open_AT).all(-1)
                    if bool(early_A.any()):
                        stays_AT = noise.denoised(logp_ATV, z_AT, t_A).exp().gather(-1, next_AT[..., None]).squeeze(-1)
                        doubt_B[rows_A] += torch.where(open_AT & early_A[:, None], 1 - stays_AT.double(), 0.0).sum(-1)
                        saved_B[rows_A] += (self.budget - clock_A - 1) * early_A
                        settled_A = settled_A | early_A
                written_AT, done_AT = move_AT, open_AT & settled_A[:, None]
            else:
                written_AT = done_AT = move_AT & (next_AT != noise.mask_id)
            windows.put(z_BL, rows_A, start_A, next_AT, written_AT)
            windows.put(open_BL, rows_A, start_A, torch.zeros_like(done_AT), done_AT)
            clock_B[rows_A] += 1
            level_B = torch.zeros(rows, dtype=torch.float64, device=device)
            level_B[rows_A] = s_A * open_BL[rows_A].any(-1)
            yield frame(level_B)
