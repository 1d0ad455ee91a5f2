"""A network whose row i predicts token i + 1, as a `Denoiser` whose row i predicts token i.

Shapes: B batch, Q queried positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError


def shift(x_BQ: Tensor) -> Tensor:
    """Rows moved one place to the right; row 0, which nothing precedes, also predicts its own token (Dream's `generation_utils.py`)."""
    return torch.cat([x_BQ[:, :1], x_BQ[:, :-1]], 1)


@dataclass(frozen=True)
class Shifted:
    """Dream (Ye et al. 2508.15487) and others that kept the head of an autoregressive base."""

    network: Callable[..., Tensor]

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, *, at_BQ: Tensor | None = None, cache: Any = None, **how: Any) -> Tensor:
        """Logits (B, Q, V) of whole texts; at_BQ as of `Transformer.forward`."""
        if cache is not None:
            raise ValueError("the row of a token is that of the one before it, which a cache would leave out")
        if how.get("pattern"):
            raise InputError("this model predicts the next token: it cannot use a sampler that checks what it wrote")
        if at_BQ is not None:  # ask for the rows before
            before_BQ = torch.cat([at_BQ[:, 1:], torch.zeros_like(at_BQ[:, :1])], 1)
            before_BQ[:, 0] |= at_BQ[:, 0]
            at_BQ = before_BQ
        return shift(self.network(z_BQ, t_B, at_BQ=at_BQ, **how))
