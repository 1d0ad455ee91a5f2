"""The one loop for diffusion samplers: every row has its own window, clock and generator.

Shapes: B rows, A rows that still have something to do, L positions of the canvas, T of the window, V vocabulary, N steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.protocols import RNG, Denoiser, Rule, Step
from dlm.sampling import windows
from dlm.sampling.rules import Ancestral
from dlm.trajectory import Canvas, Frame


@dataclass(frozen=True)
class DiffusionSampler:
    """Fill a canvas window by window, `budget` steps for each, equally spaced in time."""

    denoiser: Denoiser
    noise: MaskedNoise
    window: int
    rule: Rule = field(default_factory=Ancestral)
    budget: int = 256
    context: int = 0
    model: str = ""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise InputError(f"steps must be at least 1, got {self.budget}")
        windows.check(self.window, self.context)

    @torch.no_grad()
    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every network call. rng: one generator a row."""
        mask_id, device, rows = self.noise.mask_id, canvas.tokens_BT.device, len(canvas.tokens_BT)
        z_BL = torch.where(canvas.free_BT, mask_id, canvas.tokens_BT)
        open_BL = canvas.free_BT.clone()
        grid = torch.linspace(1, 0, self.budget + 1, dtype=torch.float64, device=device)
        alphas_N = self.noise.schedule.alpha(grid)
        # the chain starts with everything masked: where the schedule ends above 0, what it would have kept is not there
        alphas_N = ((alphas_N - alphas_N[0]) / (1 - alphas_N[0]))[1:]
        start_B = torch.full((rows,), -1, device=device)
        clock_B = torch.zeros(rows, dtype=torch.long, device=device)
        due_BT = torch.zeros(rows, self.window, dtype=torch.long, device=device)
        planned, forwards = False, 0
        while bool(open_BL.any()):
            rows_A = open_BL.any(-1).nonzero().squeeze(-1)
            start_A = windows.start(open_BL[rows_A], self.window, self.context)
            # what pads a row is read as noise, like what lies past the end of the canvas: neighbours must not change an answer
            z_AT = windows.take(z_BL[rows_A].masked_fill(~canvas.valid_BT[rows_A], mask_id), start_A, self.window, mask_id)
            open_AT = windows.take(open_BL[rows_A], start_A, self.window, False)
            free_AT = windows.take(canvas.free_BT[rows_A], start_A, self.window, False)
            entered_A = start_A != start_B[rows_A]  # rows that begin a window
            start_B[rows_A], clock_B[rows_A[entered_A]] = start_A, 0
            if bool(entered_A.any()):
                entered_B = rows_A[entered_A]
                due = self.rule.due(open_AT[entered_A], alphas_N, [rng[b] for b in entered_B.tolist()])
                planned = due is not None
                if due is not None:
                    due_BT[entered_B] = due
            if planned:  # jump to the next step in which something of the row moves
                clock_B[rows_A] = due_BT[rows_A].masked_fill(~open_AT, self.budget).min(-1).values
            clock_A = clock_B[rows_A]
            move_AT = open_AT & (due_BT[rows_A] == clock_A[:, None]) if planned else open_AT
            t_A, s_A = grid[clock_A], grid[clock_A + 1]
            logp_ATV = self.noise.log_probs(self.denoiser(z_AT, t_A), z_AT, t_A)
            forwards += 1
            step = Step(z_AT, move_AT, free_AT, logp_ATV, t_A, s_A, self.budget - clock_A)
            next_AT = self.rule(step, [rng[b] for b in rows_A.tolist()])
            written_AT = move_AT & (next_AT != mask_id)
            windows.put(z_BL, rows_A, start_A, next_AT, written_AT)
            windows.put(open_BL, rows_A, start_A, torch.zeros_like(written_AT), written_AT)
            clock_B[rows_A] += 1
            level_B = torch.zeros(rows, dtype=torch.float64, device=device)
            level_B[rows_A] = s_A * open_BL[rows_A].any(-1)
            yield Frame(z_BL.clone(), ~open_BL, level_B, self.model, forwards)
