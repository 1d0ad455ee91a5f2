"""The short convolution before attention: every position reads a few neighbours by weights of its own for each feature.

Masked training is slow at learning to look one position to the left; a depthwise convolution of the normed input begins as the identity
and gives that for almost nothing (Canon layers, Allen-Zhu 2512.17351; Hyena and Mamba have it too).
Shapes: B batch, T source positions, Q positions, J taps, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.models import elementwise
from dlm.models.config import TransformerConfig


class Neighbours(NamedTuple):
    """Where the taps of each position lie among the source positions. Rows may be one for the whole batch."""

    index_BQJ: Tensor  # int64
    absent_BQJ: Tensor  # bool: reads nothing


class BesideClean(NamedTuple):
    """In place of neighbours: the positions are [noisy | clean] in blocks of this length, as of `attention.beside_clean`."""

    block_length: int


Near = Neighbours | BesideClean | None
"""What the taps read; None: those of whole rows that nothing masks."""


def offsets(attention: str, taps: int) -> range:
    """The relative positions of the taps: on both sides, or from the left alone under causal attention."""
    first = 1 - taps if attention == "causal" else -(taps // 2)
    return range(first, first + taps)


def neighbours(steps: range, pos_BQ: Tensor, pos_BT: Tensor, allowed_BQT: Tensor | None) -> Neighbours:
    """The taps of positions pos_BQ among source positions pos_BT: a tap reads the neighbour that attention reads.

    allowed_BQT: bool, the positions that attention reads; None for all. It leaves one source position at most for a tap, where
    several stand at the same position.
    """
    step_J = torch.arange(steps.start, steps.stop, device=pos_BQ.device)
    match_BQJT = pos_BT[:, None, None] == (pos_BQ[..., None] + step_J)[..., None]
    if allowed_BQT is not None:
        match_BQJT = match_BQJT & allowed_BQT[:, :, None]
    match_BQJ, index_BQJ = match_BQJT.to(torch.uint8).max(-1)
    return Neighbours(index_BQJ, match_BQJ == 0)


class ShortConvolution(nn.Module):
    """x + sum over taps of weight * neighbour; the weights begin at 0."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.steps = offsets(config.attention, config.conv)
        self.weight = nn.Parameter(torch.zeros(config.conv, config.width))  # (J, D)

    def forward(self, x_BQD: Tensor, neighbours: Near, source_BTD: Tensor) -> Tensor:
        """(B, Q, D). source_BTD: where neighbours lie, x itself or all that a cache holds. neighbours None: x is whole rows."""
        weight_JD = self.weight.to(x_BQD.dtype)
        if neighbours is None:
            return self._shifted(x_BQD, weight_JD)
        if isinstance(neighbours, BesideClean):
            return self._beside_clean(x_BQD, weight_JD, neighbours.block_length)
        (index_BQJ, absent_BQJ), (batch, length, width) = neighbours, source_BTD.shape
        if batch > 1:
            index_BQJ = index_BQJ + torch.arange(0, batch * length, length, device=x_BQD.device)[:, None, None]
        read_BQJD = source_BTD.reshape(-1, width).index_select(0, index_BQJ.flatten()).view(*index_BQJ.shape, width)
        read_BQJD, y_BQD = read_BQJD.masked_fill(absent_BQJ[..., None], 0), x_BQD
        for read_BQD, weight_D in zip(read_BQJD.unbind(2), weight_JD, strict=True):
            y_BQD = torch.addcmul(y_BQD, read_BQD, weight_D)
        return y_BQD

    def _beside_clean(self, x_BQD: Tensor, weight_JD: Tensor, block_length: int) -> Tensor:
        """Every block, noisy or clean, as a row of its own after the clean positions before it."""
        reach, (batch, _, width) = -self.steps[0], x_BQD.shape
        blocks_BHNLD = x_BQD.view(batch, 2, -1, block_length, width)
        clean_BTD = F.pad(x_BQD[:, x_BQD.shape[1] // 2 :], (0, 0, reach, 0))
        before_BNRD = clean_BTD.unfold(1, reach, block_length)[:, : blocks_BHNLD.shape[2]].transpose(2, 3)
        rows = torch.cat([before_BNRD[:, None].expand(-1, 2, -1, -1, -1), blocks_BHNLD], 3)
        return self._shifted(rows.flatten(0, 2), weight_JD)[:, reach:].reshape(x_BQD.shape)

    def _shifted(self, x_BTD: Tensor, weight_JD: Tensor) -> Tensor:
        length, steps = x_BTD.shape[1], self.steps
        if elementwise.pay(x_BTD):
            return elementwise.convolved(x_BTD, weight_JD, steps)
        padded_BTD = F.pad(x_BTD, (0, 0, -steps[0], max(0, steps[-1])))
        y_BTD = x_BTD
        for tap, weight_D in enumerate(weight_JD):
            y_BTD = torch.addcmul(y_BTD, padded_BTD[:, tap : tap + length], weight_D)
        return y_BTD
