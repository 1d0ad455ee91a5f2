"""Functions of rows that see the same number of rows in every forward pass, so that no kernel can tell how many others there are."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 16  # of every product of a batch-invariant network


class RowFunction(Protocol):
    def __call__(self, x: Tensor, /) -> Tensor: ...


def fixed_rows(function: RowFunction, x: Tensor) -> Tensor:
    """A function of rows (..., D), called with `ROWS` rows at a time, the last ones filled up with zeros."""
    x_ND = x.flatten(0, -2)
    filled_ND = F.pad(x_ND, (0, 0, 0, -len(x_ND) % ROWS))
    y_NO = torch.cat([function(piece) for piece in torch.split(filled_ND, ROWS)])[: len(x_ND)]
    return y_NO.view(*x.shape[:-1], -1)


class FixedRows(nn.Module):
    """A module that maps rows to rows, called with `fixed_rows`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return fixed_rows(self.inner, x)
