"""Tokens are drawn at the positions that are written alone, with the numbers that these have among all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.noise.masked import MaskedNoise
from dlm.sampling import draw as drawing
from dlm.sampling.diffusion.protocols import Rule, Step
from dlm.sampling.diffusion.revising import ChangeWorst
from dlm.sampling.diffusion.unmasking import EntropyBudget, Factor, KLStable, Threshold, TopScore, drawn_at
from dlm.sampling.draw import Draw, generators

VOCAB, MASK, ROWS, LENGTH = 7, 6, 3, 12


def step() -> Step:
    noise, g = MaskedNoise(VOCAB, MASK), torch.Generator().manual_seed(0)
    z_BT = torch.where(torch.rand(ROWS, LENGTH, generator=g) < 0.7, MASK, torch.randint(MASK, (ROWS, LENGTH), generator=g))
    logp_BTV = noise.log_probs(3 * torch.randn(ROWS, LENGTH, VOCAB, generator=g), z_BT)
    level_B, left_B = torch.full((ROWS,), 0.5, dtype=torch.float64), torch.full((ROWS,), 6)
    return Step(z_BT, z_BT == MASK, logp_BTV, level_B, level_B - 0.1, left_B, left_B, noise)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of each call of the inverse CDF, rows times columns."""
    found: list[int] = []
    inner = drawing.categorical

    def categorical(logp_BTV: Tensor, u_BT: Tensor) -> Tensor:
        found.append(u_BT.numel())
        return inner(logp_BTV, u_BT)

    defaults = Draw.__call__.__defaults__
    monkeypatch.setattr(Draw.__call__, "__defaults__", (categorical,))
    assert defaults == (inner,)
    return found


RULES: list[Any] = [
    Threshold(0.9),
    Factor(),
    EntropyBudget(),
    KLStable(),
    TopScore(score="margin"),
    TopScore(score="entropy"),
    ChangeWorst(),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_few_are_drawn_and_the_text_is_the_same(rule: Rule, drawn: list[int]) -> None:
    given = step()
    next_BT = rule(given, generators(4, ROWS))
    everywhere_BT = Draw()(given.logp_BTV, generators(4, ROWS))
    written_BT = next_BT != given.z_BT
    assert 0 < int(written_BT.sum()) < int(given.open_BT.sum())
    assert torch.equal(next_BT[written_BT], everywhere_BT[written_BT])
    assert drawn[0] < drawn[1] == ROWS * LENGTH


def test_none_and_all_positions() -> None:
    given, rng = step(), generators(1, ROWS)
    assert torch.equal(drawn_at(torch.zeros_like(given.open_BT), given, Draw(), rng), given.z_BT)
    expected = Draw()(given.logp_BTV, generators(2, ROWS))
    assert torch.equal(drawn_at(torch.ones_like(given.open_BT), given, Draw(), generators(2, ROWS)), expected)
    cold = replace(given, logp_BTV=given.logp_BTV.float())
    assert torch.equal(drawn_at(torch.ones_like(given.open_BT), cold, Draw(0.0), rng), cold.logp_BTV.argmax(-1))
