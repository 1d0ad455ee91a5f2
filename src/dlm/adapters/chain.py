"""A correction of masks drafted in one forward pass, which predict as if the other draft tokens were unknown (the curse of parallel
decoding): each is told the draft tokens before its own.

A group of masks gives one distribution for each of its tokens, and they are drawn from the left: when one is drawn,
those before it stand. A small network per slot reads its mask and them; Hydra heads (Ankner et al. 2402.05109) do so without masks.
Shapes: N masks, S slot (from 0), D width, E = (S + 2) D, H inner width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Chain(nn.Module):
    """h + W silu(U [h, e_0 .. e_S] + b) for each slot: h the hidden state of a mask, e the embeddings of the S + 1 tokens from the place of
    the first mask of its group up to its own, each divided by its root mean square. W is zero at first: the state then stays as it is.
    float32, beside a base of any dtype.

    rng: of U, on the CPU.
    """

    def __init__(self, slots: int, width: int, inner: int, rng: torch.Generator | None = None) -> None:
        super().__init__()
        for slot in range(slots):
            up_HE = torch.empty(inner, (slot + 2) * width).uniform_(-1, 1, generator=rng)
            self.register_parameter(f"up_{slot}", nn.Parameter(up_HE / math.sqrt(up_HE.shape[1])))
        self.bias = nn.Parameter(torch.zeros(slots, inner))
        self.down = nn.Parameter(torch.zeros(slots, width, inner))

    def forward(self, slot: int, hidden_ND: Tensor, before_NSD: Tensor) -> Tensor:
        """The input of the output layer for masks of this slot. before_NSD: S + 1 embeddings."""
        read_NE = F.rms_norm(torch.cat([hidden_ND[:, None], before_NSD], 1).float(), hidden_ND.shape[-1:]).flatten(1)
        inner_NH = F.silu(F.linear(read_NE, cast(Tensor, getattr(self, f"up_{slot}")), self.bias[slot]))
        return hidden_ND + F.linear(inner_NH, self.down[slot]).to(hidden_ND.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A network's state is its base's, as with `dlm.adapters.lora`."""
