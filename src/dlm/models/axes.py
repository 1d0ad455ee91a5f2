"""Positions on several axes: the coordinates of a cell of a grid, and the groups that it belongs to, such as row, column and box.

A position is the number of its cell, the last axis running fastest. A group is a tile: of a grid (9, 9), tiles (1, 9) are its rows,
(9, 1) its columns and (3, 3) its boxes. Shapes: B batch, Q positions, A axes, G kinds of groups, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Shape = Sequence[int]


def coordinates(pos: Tensor, axes: Shape) -> Tensor:
    """The coordinates (..., A) of positions (...); those after the last cell go on along the first axis."""
    found, rest = [], pos
    for size in reversed(axes[1:]):
        found.append(rest % size)
        rest = rest // size
    return torch.stack([rest, *reversed(found)], -1)


def tile_of(at: Tensor, axes: Shape, tile: Shape) -> Tensor:
    """The number (...) of the tile that holds the coordinates (..., A)."""
    number = torch.zeros_like(at[..., 0])
    for axis, (size, side) in enumerate(zip(axes, tile, strict=True)):
        number = number * (size // side) + at[..., axis] % size // side
    return number


def tiles(axes: Shape, tile: Shape) -> int:
    """How many of them fill the grid."""
    return math.prod(size // side for size, side in zip(axes, tile, strict=True))


def bordered(axes: Shape, groups: Sequence[Shape]) -> Shape:
    """The tile that pictures draw a border around: the last group of several rows and columns, as a box is; the whole grid without one."""
    return next((tile for tile in reversed(groups) if min(tile) > 1), axes)


def picture(axes: Shape, groups: Sequence[Shape]) -> tuple[Shape, Shape]:
    """Rows and columns of a drawing of the axes, and the tile that it draws a border around: of more than two axes the first and third run
    down and across, each with a grid of the second and fourth at each of its places."""
    if len(axes) != 4:
        return axes, bordered(axes, groups)
    return (axes[0] * axes[1], axes[2] * axes[3]), (axes[1], axes[3])


def check(axes: Shape, groups: Sequence[Shape], window: int, rotated: int) -> None:
    """ValueError for axes or groups that do not fill a window. rotated: dimensions of a head that are divided among the axes."""
    if not axes:
        if groups:
            raise ValueError("groups are tiles of a grid: give its axes")
        return
    if min(axes) < 1 or math.prod(axes) != window:
        raise ValueError(f"axes {tuple(axes)} have {math.prod(axes)} cells, the window {window} positions")
    if rotated % (2 * len(axes)):
        raise ValueError(
            f"{rotated} rotated dimensions of a head are not divided among {len(axes)} axes: take a multiple of {2 * len(axes)}"
        )
    for tile in groups:
        if len(tile) != len(axes) or min(tile) < 1 or any(size % side for size, side in zip(axes, tile, strict=True)):
            raise ValueError(f"tiles {tuple(tile)} do not fill the axes {tuple(axes)}")


class GroupEmbedding(nn.Embedding):
    """The sum of a learned vector for each group that a position belongs to, (B, Q, D)."""

    def __init__(self, axes: Shape, groups: Sequence[Shape], width: int) -> None:
        counts = [tiles(axes, tile) for tile in groups]
        super().__init__(sum(counts), width)
        self.axes, self.groups, self.first = axes, groups, [sum(counts[:i]) for i in range(len(counts))]

    def forward(self, pos_BQ: Tensor) -> Tensor:
        at_BQA = coordinates(pos_BQ, self.axes)
        kinds = zip(self.first, self.groups, strict=True)
        label_BQG = torch.stack([first + tile_of(at_BQA, self.axes, tile) for first, tile in kinds], -1)
        return super().forward(label_BQG).sum(-2)
