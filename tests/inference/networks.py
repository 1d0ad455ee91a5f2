"""What the tests of `dlm.inference` share: a small network, a text, and logits from forward passes of some size.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conftest import make_model
from dlm.language_model import LanguageModel
from dlm.models.transformer import Transformer

LLAMA: dict[str, Any] = {"mlp": "swiglu", "heads": 6, "kv_heads": 2, "width": 48, "mlp_width": 96, "qk_norm": False, "tied": True}
OURS = {"mlp": "relu2", "qkv_bias": True}
LENGTH = 72  # more than one block of keys


def model(**changes: Any) -> LanguageModel:
    return make_model("autoregressive", window=LENGTH, context=8, **(LLAMA | changes))


def text(made: LanguageModel, rows: int = 3) -> Tensor:
    return torch.randint(made.tokenizer.vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def in_calls(network: Transformer, z_BT: Tensor, size: int, room: int = LENGTH, cache: Any = None) -> Tensor:
    """Logits from forward passes of so many positions against a cache."""
    cache, found = cache or network.ragged_cache(len(z_BT), room), []
    for begin in range(0, z_BT.shape[1], size):
        z_BQ = z_BT[:, begin : begin + size]
        queries = z_BQ.shape[1]
        pos_BQ = (begin + torch.arange(queries)).expand_as(z_BQ)
        own_BQQ = torch.ones(len(z_BT), queries, queries, dtype=torch.bool).tril()
        found.append(network(z_BQ, pos_BQ=pos_BQ, own_BQQ=own_BQQ, cache=cache))
    return torch.cat(found, 1)
