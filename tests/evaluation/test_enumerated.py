"""The bound on an enumerated distribution: the entropy for the exact posterior, by the chain rule for a model that knows nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conftest import make_model
from dlm.evaluation.enumerated import excess, posterior
from dlm.grids.sudoku import Sudoku
from dlm.language_model import load
from dlm.noise import loss
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import parse

NOISE = MaskedNoise(5, 4, parse("linear"))
GRIDS = Sudoku(4).corpus("all")


def test_the_exact_posterior_is_at_the_entropy() -> None:
    found = excess(NOISE, lambda z_BT, _: posterior(GRIDS, z_BT, NOISE), GRIDS, draws=2)
    assert found.excess == pytest.approx(0, abs=1e-6)
    assert found.bound == pytest.approx(math.log(288), abs=1e-6)


def test_a_model_that_knows_nothing_is_at_16_cells_of_log_4() -> None:
    def nothing(z_BT: Tensor, _t_B: Tensor) -> Tensor:
        return torch.zeros(*z_BT.shape, 5)

    found = excess(NOISE, nothing, GRIDS, draws=2)
    assert found.bound == pytest.approx(16 * math.log(4), abs=5 * found.stderr)
    assert found.stderr < 0.05


@torch.no_grad()
def test_it_is_the_any_order_bound_with_its_noise_taken_away() -> None:
    lm, rng = make_model(alphabet="1234", window=16), torch.Generator().manual_seed(1)
    found, free, passes = excess(NOISE, lm.predict, GRIDS, draws=2), torch.ones_like(GRIDS, dtype=torch.bool), 12
    nats = torch.stack([loss.any_order(NOISE, lm.predict, GRIDS, free, rng, loss.draw_levels(288, rng)).mean() for _ in range(passes)])
    assert found.bound == pytest.approx(nats.mean().item(), abs=5 * (nats.std().item() / math.sqrt(passes) + found.stderr))


@pytest.mark.slow
def test_the_bundled_model_is_within_a_hundredth_of_the_entropy() -> None:
    lm = load("sudoku-4")
    assert isinstance(lm.noise, MaskedNoise)
    found = excess(lm.noise, lm.predict, GRIDS, draws=4)
    assert found.entropy == pytest.approx(5.663, abs=1e-3)
    assert 0 < found.excess + 3 * found.stderr < 0.01 * found.entropy
