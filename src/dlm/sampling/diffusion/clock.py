"""The clock of every row: the steps of its blocks, their noise levels, and the positions that move in the next one.

Shapes: B rows, A rows that move now, T positions of the window, N steps. Levels are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import time_when
from dlm.protocols import RNG, NoiseProcess
from dlm.sampling.batching import stacked
from dlm.sampling.diffusion.protocols import PlannedRule
from dlm.sampling.draw import beside, uniform

NEVER_STEP = 2**62
"""The step at which a position moves that is not open."""


@dataclass(frozen=True)
class Move:
    """The next step of the rows A: the positions that move, from level t to s; left_A: steps left, this one included, of steps_A."""

    at_AT: Tensor
    t_A: Tensor
    s_A: Tensor
    left_A: Tensor
    steps_A: Tensor


class Clock:
    """steps_B: of every block of a row; clock_B: of them taken in the block that is worked on. Steps are equally spaced in time.

    due_BT: the step at which a planned rule moves each position; alpha_BT: the alpha at which it does where no grid says so, else nan.
    leaves_grid: whether there may be such an alpha.
    """

    def __init__(self, noise: NoiseProcess, steps_B: Tensor, window: int) -> None:
        self.noise, self.schedule, self.steps_B, self.clock_B = noise, noise.schedule, steps_B, torch.zeros_like(steps_B)
        self.due_BT = steps_B.new_zeros(len(steps_B), window)
        self.alpha_BT = torch.full_like(self.due_BT, torch.nan, dtype=torch.float64)
        self.leaves_grid = False
        self._grids: dict[int, tuple[Tensor, Tensor]] = {}
        self._counts = set(steps_B.tolist())  # on the host, which need not wait for them in every step

    def join(self, other: Clock) -> None:
        """Take in the rows of another clock."""
        for name in ("steps_B", "clock_B", "due_BT", "alpha_BT"):
            setattr(self, name, stacked(getattr(self, name), getattr(other, name)))
        self._counts |= other._counts
        self.leaves_grid |= other.leaves_grid

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        for name in ("steps_B", "clock_B", "due_BT", "alpha_BT"):
            setattr(self, name, getattr(self, name)[rows_K])
        self._counts = set(self.steps_B.tolist())

    def restart(self, rows_A: Tensor) -> None:
        """These rows begin a block."""
        self.clock_B[rows_A] = 0

    def plan(self, rule: PlannedRule, rows_A: Tensor, open_AT: Tensor, rng: RNG) -> None:
        """Ask a rule when the open positions of rows that begin a block move."""
        steps_A = self.steps_B[rows_A]
        for steps in set(steps_A.tolist()):
            at_A = steps_A == steps
            drawn_BT = beside(uniform([rng[a] for a in at_A.nonzero().squeeze(-1).tolist()], open_AT.shape[1]), self.alphas(steps))
            drawn_BT = self.noise.revealed_at(drawn_BT) if isinstance(self.noise, MaskedNoise) else drawn_BT
            due_BT, alpha_BT = rule.plan(open_AT[at_A], self.alphas(steps), drawn_BT)
            self.due_BT[rows_A[at_A]], self.alpha_BT[rows_A[at_A]] = due_BT, alpha_BT
            self.leaves_grid |= alpha_BT.device.type != "cpu" or not bool(alpha_BT.isnan().all())  # a GPU is not waited for

    def next_planned(self, rows_A: Tensor, open_AT: Tensor) -> Move:
        """Jump to the next step in which a position of each row is due."""
        due_AT = self.due_BT[rows_A].masked_fill(~open_AT, NEVER_STEP)
        clock_A = due_AT.amin(-1)
        self.clock_B[rows_A] = clock_A
        at_AT = open_AT & (due_AT == clock_A[:, None])
        t_A, s_A = self.levels(rows_A)
        if not self.leaves_grid:
            return self._move(rows_A, at_AT, t_A, s_A)
        alpha_A = self.alpha_BT[rows_A].masked_fill(~at_AT, -1).amax(-1)  # of a rule without a grid
        reached_A = time_when(self.schedule, alpha_A.clamp(min=0))
        return self._move(rows_A, at_AT, *(torch.where(alpha_A >= 0, reached_A, x_A) for x_A in (t_A, s_A)))

    def next(self, rows_A: Tensor, at_AT: Tensor) -> Move:
        """The next step of the grid, in which all these positions may move."""
        return self._move(rows_A, at_AT, *self.levels(rows_A))

    def tick(self, rows_A: Tensor) -> None:
        """These rows have taken their step."""
        self.clock_B[rows_A] += 1

    def levels(self, rows_A: Tensor) -> tuple[Tensor, Tensor]:
        """t_A and s_A of the next step of these rows."""
        steps_A, clock_A = self.steps_B[rows_A], self.clock_B[rows_A]
        if len(self._counts) == 1:
            (steps,) = self._counts
            grid_N = self._grid(steps)[0]
            return grid_N[clock_A.clamp(max=steps - 1)], grid_N[(clock_A + 1).clamp(max=steps)]
        t_A, s_A = (torch.zeros(len(rows_A), dtype=torch.float64, device=steps_A.device) for _ in range(2))
        for steps in self._counts:
            grid_N, at_A = self._grid(steps)[0], steps_A == steps
            t_A = torch.where(at_A, grid_N[clock_A.clamp(max=steps - 1)], t_A)
            s_A = torch.where(at_A, grid_N[(clock_A + 1).clamp(max=steps)], s_A)
        return t_A, s_A

    def alphas(self, steps: int) -> Tensor:
        """The probability that a position masked at t = 1 is revealed by the end of each step, float64 (N,)."""
        return self._grid(steps)[1]

    def _move(self, rows_A: Tensor, at_AT: Tensor, t_A: Tensor, s_A: Tensor) -> Move:
        steps_A = self.steps_B[rows_A]
        return Move(at_AT, t_A, s_A, (steps_A - self.clock_B[rows_A]).clamp(min=1), steps_A)

    def _grid(self, steps: int) -> tuple[Tensor, Tensor]:
        if steps not in self._grids:
            grid_N = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=self.steps_B.device)
            alphas_N, last = self.schedule.alpha(grid_N), self.schedule.alpha(grid_N[0])
            # the chain starts with everything masked: where the schedule ends above 0, the share that it would keep is missing
            self._grids[steps] = grid_N, ((alphas_N - last) / (1 - last))[1:]
        return self._grids[steps]
