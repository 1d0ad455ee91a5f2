"""Positions on several axes: rotations by coordinate and embeddings by tile, each against a second way to compute it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dlm.inference.fused import fuse
from dlm.models import axes
from dlm.models.adaln import AdaLNConfig
from dlm.models.block import rotary, rotate
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer

GRID: dict[str, Any] = {"axes": (4, 6), "groups": ((1, 6), (4, 1), (2, 3)), "window": 24}


def network(**changes: Any) -> Transformer:
    sizes: dict[str, Any] = {"vocab_size": 7, "layers": 2, "heads": 2, "width": 16} | GRID | changes
    made, rng = Transformer(TransformerConfig(**sizes)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=rng)
    return made.eval().requires_grad_(False)


def test_coordinates_are_those_of_numpy() -> None:
    shape = (2, 3, 4)
    found = axes.coordinates(torch.arange(24), shape)
    assert torch.equal(found, torch.from_numpy(np.stack(np.unravel_index(np.arange(24), shape), -1)))


def test_tiles_of_a_sudoku_are_its_rows_columns_and_boxes() -> None:
    at = axes.coordinates(torch.arange(81), (9, 9))
    cells = torch.arange(81).view(9, 9)
    for tile, name in (((1, 9), "row"), ((9, 1), "column"), ((3, 3), "box")):
        label = axes.tile_of(at, (9, 9), tile)
        assert axes.tiles((9, 9), tile) == 9
        for number in range(9):
            down, right = number // 3 * 3, number % 3 * 3
            wanted = {"row": cells[number], "column": cells[:, number], "box": cells[down : down + 3, right : right + 3]}[name]
            assert torch.equal((label == number).nonzero().flatten(), wanted.flatten()), name


def test_the_scores_of_rotated_heads_depend_on_the_difference_of_coordinates() -> None:
    """The half of a head that an axis rotates turns as a plain head of that size does by the coordinate alone."""
    q, k = torch.randn(2, 1, 1, 24, 8, generator=torch.Generator().manual_seed(0))
    at = axes.coordinates(torch.arange(24)[None], (4, 6))
    cos, sin = rotary(torch.arange(24)[None], 8, 100.0, axes=(4, 6))
    whole = rotate(q, cos, sin) @ rotate(k, cos, sin).mT
    parts = torch.zeros_like(whole)
    for axis, dims in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
        turns = rotary(at[..., axis], 4, 100.0)
        parts += rotate(q[..., dims], *turns) @ rotate(k[..., dims], *turns).mT
    assert torch.allclose(whole, parts, atol=1e-5)


def test_one_axis_is_the_plain_rotation() -> None:
    pos = torch.arange(24)[None]
    assert all(torch.equal(a, b) for a, b in zip(rotary(pos, 8, 100.0), rotary(pos, 8, 100.0, axes=(24,)), strict=True))


def test_group_embeddings_are_products_of_indicator_matrices() -> None:
    made = network()
    assert made.group_embed is not None
    label = torch.zeros(24, 4 + 6 + 4)
    for row in range(4):
        for column in range(6):
            label[row * 6 + column, [row, 4 + column, 10 + row // 2 * 2 + column // 3]] = 1
    assert torch.allclose(made.group_embed(torch.arange(24)[None])[0], label @ made.group_embed.weight, atol=1e-6)


def test_a_row_read_at_its_positions_is_the_row_of_the_whole() -> None:
    """Positions, not their order, decide: the cells may come in any order."""
    made, rng = network(), torch.Generator().manual_seed(1)
    z, order = torch.randint(7, (1, 24), generator=rng), torch.randperm(24, generator=rng)
    assert torch.allclose(made(z)[:, order], made(z[:, order], pos_BQ=order[None]), atol=1e-5)


def test_without_groups_a_network_forgets_boxes_and_with_them_it_does_not() -> None:
    z = torch.zeros(1, 24, dtype=torch.long)  # all cells alike: nothing but embeddings can tell them apart
    assert torch.allclose((plain := network(groups=()))(z)[0, 0], plain(z)[0, 5], atol=1e-5)
    assert not torch.allclose((grid := network())(z)[0, 0], grid(z)[0, 5], atol=1e-3)


def test_fused_and_shadowed_networks_read_the_same_grid() -> None:
    z = torch.randint(7, (2, 24), generator=torch.Generator().manual_seed(2))
    plain = network()(z)
    assert torch.allclose(fuse(network())(z), plain, atol=1e-5)
    beside = network()(torch.cat([z, torch.full_like(z, 6)], 1), pattern="shadow")
    assert torch.allclose(beside[:, :24], plain, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": (5, 5)}, "25 cells, the window 24"),
        ({"axes": (4, 6), "groups": ((3, 3),)}, "do not fill"),
        ({"axes": (), "groups": ((1, 6),)}, "give its axes"),
        ({"axes": (2, 2, 6), "groups": ()}, "not divided among 3 axes"),
        ({"conv": 5}, "one axis"),
    ],
)
def test_axes_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network(**changes)


def test_a_border_stands_around_boxes_or_the_whole() -> None:
    assert axes.bordered((4, 6), ((1, 6), (2, 3), (4, 1))) == (2, 3)
    assert axes.bordered((5, 5), ((1, 5), (5, 1))) == axes.bordered((5, 5), ()) == (5, 5)


def test_the_network_of_other_projects_has_no_groups() -> None:
    with pytest.raises(ValueError, match="no embeddings of groups"):
        AdaLNConfig(vocab_size=7, heads=2, width=16, **GRID)
