"""Means with their error, ranks and fronts, on cases with a known answer."""

from __future__ import annotations

import math

import pytest
import torch

from dlm.evaluation.statistics import Mean, interval, pareto_front, spearman, standard_error


def test_a_mean_states_its_error() -> None:
    mean = Mean.of(torch.tensor([1.0, 3.0]))
    assert mean.value == 2.0
    assert mean.stderr == pytest.approx(1.0)
    assert mean.count == 2


@pytest.mark.parametrize(("count", "t"), [(2, 12.70620), (5, 2.77645), (11, 2.22814), (10_001, 1.96020)])
def test_the_interval_is_students(count: int, t: float) -> None:
    """Quantiles of the printed tables: few values have a wider interval than 1.96 standard errors."""
    values_N = torch.arange(count, dtype=torch.float64)
    mean = Mean.of(values_N)
    assert mean.band95 == pytest.approx(t * float(values_N.std()) / math.sqrt(count), rel=1e-5)
    assert mean.record() == {"mean": mean.value, "band95": mean.band95}


def test_nineteen_of_twenty_intervals_hold_the_mean() -> None:
    values_NX = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean_X, band_X = interval(values_NX)
    assert float((mean_X.abs() <= band_X).double().mean()) == pytest.approx(0.95, abs=0.005)


def test_a_single_value_has_no_error() -> None:
    assert math.isnan(Mean.of(torch.tensor([3.0])).band95)
    assert standard_error(torch.ones(1, 2)).isnan().all()


def test_missing_values_are_left_out() -> None:
    values_NX = torch.tensor([[1.0, 5.0], [3.0, math.nan], [5.0, 7.0], [math.nan, math.nan]])
    mean_X, band_X = interval(values_NX)
    assert mean_X.tolist() == [3.0, 6.0]
    alone = [Mean.of(torch.tensor(column)).band95 for column in ([1.0, 3.0, 5.0], [5.0, 7.0])]
    assert band_X.tolist() == pytest.approx(alone)


def test_rank_correlation() -> None:
    assert spearman([0.1, 5.0, 7.0, 9.0], [1, 2, 3, 4]) == pytest.approx(1)
    assert spearman([1, 2, 3], [30.0, 20.0, 10.0]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert math.isnan(spearman([1, 2], [1, 2]))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_ties_have_their_average_rank() -> None:
    """Ranks 1.5 1.5 3 4 against 1 2 3 4: correlation 4.5 / sqrt(4.5 * 5), whatever the order of the pairs."""
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(math.sqrt(0.9))
    assert spearman([1, 1, 2, 3], [2, 1, 3, 4]) == pytest.approx(math.sqrt(0.9))


def test_the_front_is_what_nothing_beats() -> None:
    points = [(3, 1.0), (1, 5.0), (2, 5.0), (2, 3.0), (1, 6.0), (4, 1.0)]
    assert pareto_front(points, lambda p: p[0], lambda p: p[1]) == [(1, 5.0), (2, 3.0), (3, 1.0)]
    assert pareto_front([], lambda p: 0.0, lambda p: 0.0) == []
