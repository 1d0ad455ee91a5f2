"""A network that reads the text causally and one block after it fully, as a `Denoiser` of that block (Nemotron-Labs-Diffusion).

Shapes: B batch, Q queried positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlm.models.transformer import Transformer


@dataclass(frozen=True)
class AfterText:
    """The last row of the text predicts the first token of the block, as an autoregressive model's; rows of masks predict their own."""

    network: Transformer
    reads_begin: ClassVar[bool] = True  # begin_B1
    picks: ClassVar[bool] = True  # index_BC

    def __call__(
        self,
        z_BQ: Tensor,
        t_B: Tensor | None = None,
        *,
        begin_B1: Tensor | None = None,
        at_BQ: Tensor | None = None,
        index_BC: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        """Logits (B, Q, V), or (B, C, V) at index_BC. begin_B1: where the block of each row begins; without it the whole text is one.

        at_BQ and index_BC as of `Transformer.forward`. Over a cache, the position before the block is among those of pos_BQ
        (`dlm.sampling.diffusion.cache_policies.CausalText` sees to it).
        """
        if begin_B1 is None:
            whole_BQV: Tensor = self.network(z_BQ, t_B, at_BQ=at_BQ, index_BC=index_BC, **how)
            return whole_BQV
        before_B1, first_B1 = (begin_B1 - 1).clamp(min=0), begin_B1
        if (pos_BQ := how.get("pos_BQ")) is not None:  # their places among those that are read
            before_B1, first_B1 = ((pos_BQ == place_B1).int().argmax(-1, keepdim=True) for place_B1 in (before_B1, first_B1))
        if index_BC is not None:
            index_BC = torch.where(index_BC == first_B1, before_B1, index_BC)
            picked_BCV: Tensor = self.network(z_BQ, t_B, begin_B1=begin_B1, index_BC=index_BC, **how)
            return picked_BCV
        if at_BQ is not None:
            at_BQ = at_BQ.scatter(1, before_B1, at_BQ.gather(1, before_B1) | at_BQ.gather(1, first_B1))
        logits_BQV: Tensor = self.network(z_BQ, t_B, begin_B1=begin_B1, at_BQ=at_BQ, **how)
        vocabulary = logits_BQV.shape[-1]
        logits_B1V = logits_BQV.gather(1, before_B1[..., None].expand(-1, -1, vocabulary))
        return logits_BQV.scatter(1, first_B1[..., None].expand(-1, -1, vocabulary), logits_B1V)
