"""A network that is told how many steps a sampler has taken, in place of the noise level (the samplers of tiny-diffusion).

They count from 0, the first step, on a table that training filled the other way round; a preset that is to write their ids does so too.
Shapes: B batch, Q queried positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StepNumber:
    """steps: of a window, equally spaced in time, so that step k of n begins at t = 1 - k / n."""

    network: Callable[..., Tensor]
    steps: int

    @property
    def picks(self) -> bool:
        return bool(getattr(self.network, "picks", False))

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **how: Any) -> Tensor:
        """Logits (B, Q, V)."""
        assert t_B is not None
        return self.network(z_BQ, ((1 - t_B) * self.steps).round().long(), **how)
