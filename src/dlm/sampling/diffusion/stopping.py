"""Adaptive stopping: a revising rule is done at the end of its steps, or once nothing has changed for a while.

Shapes: B rows, A rows that moved, T positions of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.draw import pick


class Stopping:
    """until_settled: steps without a change that end a block; 0 waits for the last step.

    saved_B: steps not taken; doubt_B: the expected number of tokens that those steps would have changed.
    """

    def __init__(self, until_settled: int, rows: int, device: torch.device) -> None:
        self.until_settled = until_settled
        self.still_B, self.saved_B = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        self.doubt_B = torch.zeros(rows, dtype=torch.float64, device=device)

    def join(self, other: Stopping) -> None:
        """Take in the rows of another."""
        for name in ("still_B", "saved_B", "doubt_B"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        for name in ("still_B", "saved_B", "doubt_B"):
            setattr(self, name, getattr(self, name)[rows_K])

    def begin(self, rows_A: Tensor) -> None:
        """These rows begin a block."""
        self.still_B[rows_A] = 0

    def __call__(self, rows_A: Tensor, step: Step, next_AT: Tensor, open_AT: Tensor) -> Tensor:
        """Whether each row has settled, bool (A,)."""
        settled_A = step.left_B == 1
        if not self.until_settled:
            return settled_A
        quiet_A = ((next_AT == step.z_BT) | ~open_AT).all(-1)
        self.still_B[rows_A] = (self.still_B[rows_A] + 1) * quiet_A
        possible_AT = pick(step.logp_BTV, next_AT) > -torch.inf  # no mask, nothing that is forbidden
        written_A = (possible_AT | ~open_AT).all(-1)
        early_A = (self.still_B[rows_A] >= self.until_settled) & ~settled_A & written_A
        if bool(early_A.any()):
            stays_AT = self._stays(step, next_AT)
            self.doubt_B[rows_A] += torch.where(open_AT & early_A[:, None], 1 - stays_AT.double(), 0.0).sum(-1)
            self.saved_B[rows_A] += (step.left_B - 1) * early_A
        return settled_A | early_A

    def _stays(self, step: Step, next_AT: Tensor) -> Tensor:
        """p(token | the text), with the token hidden where the network was asked that."""
        if step.shadow_BTV is None:
            logp_ATV = step.noise.denoised(step.logp_BTV, step.z_BT, step.t_B)
        else:
            logp_ATV = step.noise.log_probs(step.shadow_BTV, torch.full_like(step.z_BT, step.noise.mask_id), step.t_B)
        return pick(logp_ATV, next_AT).exp()
