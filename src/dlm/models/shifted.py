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

    @property
    def picks(self) -> bool:
        return bool(getattr(self.network, "picks", False))

    def __call__(
        self,
        z_BQ: Tensor,
        t_B: Tensor | None = None,
        *,
        at_BQ: Tensor | None = None,
        index_BC: Tensor | None = None,
        cache: Any = None,
        **how: Any,
    ) -> Tensor:
        """Logits (B, Q, V); at_BQ and index_BC as of `Transformer.forward`.

        Of the positions read over a cache, in rising order, those with the position before them among the positions read have logits
        (`dlm.sampling.diffusion.cache_policies.BeforeToo` sees to it).
        """
        if how.get("pattern"):
            raise InputError("this model predicts the next token: it cannot use a sampler that checks what it wrote")
        how |= {"cache": cache} if cache is not None else {}
        if index_BC is not None:
            return self.network(z_BQ, t_B, index_BC=(index_BC - 1).clamp(min=0), **how)
        if at_BQ is not None:  # ask for the rows before
            before_BQ = torch.cat([at_BQ[:, 1:], torch.zeros_like(at_BQ[:, :1])], 1)
            before_BQ[:, 0] |= at_BQ[:, 0]
            at_BQ = before_BQ
        return shift(self.network(z_BQ, t_B, at_BQ=at_BQ, **how))
