"""How many steps the blocks of each row take, and the noise level at which a step begins and ends.

Shapes: B rows, A rows that move now, N steps. Levels are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlm.protocols import NoiseSchedule


class Clock:
    """steps_B: of every block of a row; clock_B: of them taken in the block that is worked on. Steps are equally spaced in time."""

    def __init__(self, schedule: NoiseSchedule, steps_B: Tensor) -> None:
        self.schedule, self.steps_B, self.clock_B = schedule, steps_B, torch.zeros_like(steps_B)
        self._grids: dict[int, tuple[Tensor, Tensor]] = {}

    def join(self, other: Clock) -> None:
        """Take in the rows of another clock."""
        self.steps_B, self.clock_B = torch.cat([self.steps_B, other.steps_B]), torch.cat([self.clock_B, other.clock_B])

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        self.steps_B, self.clock_B = self.steps_B[rows_K], self.clock_B[rows_K]

    def levels(self, rows_A: Tensor) -> tuple[Tensor, Tensor]:
        """t_A and s_A of the next step of these rows."""
        steps_A, clock_A = self.steps_B[rows_A], self.clock_B[rows_A]
        ends_A2 = torch.empty(len(rows_A), 2, dtype=torch.float64, device=steps_A.device)
        for steps in set(steps_A.tolist()):
            grid_N, at_A = self._grid(steps)[0], steps_A == steps
            ends_A2[at_A] = torch.stack([grid_N[clock_A[at_A].clamp(max=steps - 1)], grid_N[(clock_A[at_A] + 1).clamp(max=steps)]], -1)
        return ends_A2[:, 0], ends_A2[:, 1]

    def alphas(self, steps: int) -> Tensor:
        """The chance that a position masked at t = 1 is revealed by the end of each step, float64 (N,)."""
        return self._grid(steps)[1]

    def _grid(self, steps: int) -> tuple[Tensor, Tensor]:
        if steps not in self._grids:
            grid_N = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=self.steps_B.device)
            alphas_N, last = self.schedule.alpha(grid_N), self.schedule.alpha(grid_N[0])
            # the chain starts with everything masked: where the schedule ends above 0, what it would have kept is not there
            self._grids[steps] = grid_N, ((alphas_N - last) / (1 - last))[1:]
        return self._grids[steps]
