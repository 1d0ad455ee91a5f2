"""The positions that a step writes go through a rule alone, and nothing that it writes changes.

Shapes: B rows, T positions, C columns, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.noise.masked import MaskedNoise
from dlm.protocols import RNG, OwnDraws
from dlm.sampling.diffusion import cache_policies
from dlm.sampling.diffusion.columns import Columns
from dlm.sampling.diffusion.guidance import ClassifierFree
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import Rule, Step
from dlm.sampling.diffusion.transfer import Origin, Transfer
from dlm.sampling.diffusion.unmasking import Ancestral, EntropyBudget, Factor, FirstHitting, KLStable, Threshold, TopScore
from dlm.sampling.draw import Draw, generators, uniform
from dlm.trajectory import Canvas, Frame

VOCAB, WINDOW = 11, 24
NOISE = MaskedNoise(VOCAB, VOCAB - 1)
ROWS: list[list[int | None]] = [[1, 2, 3] + [None] * 18, [4] * 5 + [None] * 4 + [6, 7], [None, 2, None, None, 3] * 4]
AT_BT = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)


@pytest.fixture(scope="module")
def network() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(TransformerConfig(VOCAB, WINDOW, layers=2, heads=2, width=16)).eval().requires_grad_(False).double()
    for weight in made.parameters():
        weight.copy_(0.4 * torch.randn_like(weight))
    return made


@dataclass(frozen=True)
class Whole:
    """A rule that is given whole windows."""

    inner: Rule
    revises = False
    waits = True

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        assert step.columns is None
        return self.inner(step, rng)


class Seen:
    """A network that keeps the shapes of its logits."""

    picks = True

    def __init__(self, inner: Transformer) -> None:
        self.inner, self.shapes = inner, list[tuple[int, ...]]()

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **how: Any) -> Tensor:
        logits: Tensor = self.inner(z_BQ, t_B, **how)
        self.shapes.append(tuple(logits.shape))
        return logits


def run(denoiser: Any, rule: Any, **options: Any) -> list[Frame]:
    sampler = DiffusionSampler(denoiser, NOISE, WINDOW, rule, 9, fills_window=False, block_phase="prompt", **options)
    return list(sampler.steps(Canvas.from_rows(ROWS, fill=VOCAB - 1), rng=generators(3, len(ROWS))))


DRAWN = Draw(0.9, top_p=0.95)
RULES = [
    Ancestral(DRAWN),
    FirstHitting(DRAWN),
    TopScore(DRAWN),
    TopScore(DRAWN, "margin"),
    Threshold(0.3, DRAWN),
    Factor(2.0, DRAWN),
    EntropyBudget(1.0, DRAWN),
    KLStable(0.2, 0.5, DRAWN),
    Transfer("even", draw=DRAWN),
    Transfer("even", "random", draw=DRAWN),
    Transfer("rounded", "order", draw=DRAWN),
    Transfer("by-time", "entropy", narrowed=True, score_temperature=0.3, draw=DRAWN),
    Transfer("even", last=(3, 4), draw=Draw(0.0)),
    Origin(DRAWN),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("options", [{}, {"block_length": 4}, {"guidance": ClassifierFree(2.0, VOCAB - 1)}], ids=str)
def test_a_pointwise_rule_writes_what_it_writes_in_whole_windows(network: Transformer, rule: Any, options: dict[str, Any]) -> None:
    if isinstance(rule, Ancestral | FirstHitting):
        whole = run(lambda z, t, at_BQ=None, **how: network(z, t, **how), rule, **options)  # planned: its columns from dense logits
    else:
        whole = run(network, Whole(rule), **options)
    columns = run(network, rule, **options)
    assert [f.tokens_BT.tolist() for f in columns] == [f.tokens_BT.tolist() for f in whole]
    assert columns[-1].settled_BT.all()


@pytest.mark.parametrize("cache", [None, cache_policies.Dual()], ids=str)
def test_due_positions_alone_have_logits(network: Transformer, cache: Any) -> None:
    seen = Seen(network)
    run(seen, TopScore(DRAWN), block_length=4, cache=cache, make_cache=network.window_cache)
    assert seen.shapes
    assert max(shape[1] for shape in seen.shapes) == 4


def test_columns_of_positions() -> None:
    columns = Columns.of(AT_BT)
    x_BT = torch.arange(10).view(2, 5)
    assert columns.take(x_BT)[0].tolist() == [1, 3, 4]
    assert columns.take(x_BT)[1, 0] == 7
    assert columns.real_BC.tolist() == [[True, True, True], [True, False, False]]
    assert columns.put(x_BT, -torch.ones(2, 3, dtype=torch.long)).tolist() == [[0, -1, 2, -1, -1], [5, 6, -1, 8, 9]]
    assert torch.equal(columns.at_BT, AT_BT)
    assert [index.tolist() for index in columns.places] == [[0, 0, 0, 1], [1, 3, 4, 2], [0, 1, 2, 0]]
    assert columns.take(torch.arange(20).view(2, 5, 2))[0].tolist() == [[2, 3], [6, 7], [8, 9]]
    assert torch.equal(columns.repeat(2).index_BC, columns.index_BC.repeat(2, 1))
    read_BT = AT_BT | torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    among = columns.among(read_BT)
    assert (among.index_BC[0].tolist(), int(among.index_BC[1, 0]), among.width) == ([1, 2, 3], 2, 4)


def test_each_position_is_given_the_number_of_the_whole_window() -> None:
    columns = Columns.of(AT_BT)
    whole = uniform([OwnDraws(g, 4) for g in generators(5, 2)], 5)
    picked = uniform(columns.draws([OwnDraws(g, 4) for g in generators(5, 2)]), 3)
    assert torch.equal(picked[columns.real_BC], whole[AT_BT])


def test_logits_at_an_index_are_those_of_the_whole(network: Transformer) -> None:
    z_BT = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    index_BC = torch.tensor([[6, 2, 2], [0, 1, 5]])
    whole, picked = network(z_BT), network(z_BT, index_BC=index_BC)
    assert torch.allclose(picked, whole.gather(1, index_BC[..., None].expand(-1, -1, VOCAB)), atol=1e-12)
