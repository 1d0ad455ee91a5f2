"""A network of another library in the place of one of ours: what such networks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer


class WrappedNetwork(Transformer):
    """`inner` computes, `config` describes it; no blocks of ours are built."""

    def __init__(self, inner: Any, config: TransformerConfig) -> None:
        nn.Module.__init__(self)  # the parts of a Transformer are those of `inner`
        self.inner, self.config = inner, config

    @property
    def device(self) -> torch.device:
        found: torch.device = self.inner.device
        return found

    @property
    def quantized(self) -> bool:
        return False
