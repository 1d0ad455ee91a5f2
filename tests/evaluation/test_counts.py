"""Count models against hand enumeration, and their samples against their own probabilities."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from dlm.evaluation.counts import CountModel, grams

ABAAB, BA = np.array([0, 1, 0, 0, 1]), np.array([1, 0])


def test_grams_are_numbered_by_their_digits() -> None:
    assert grams(np.array([0, 1, 2, 3]), 2, 4).tolist() == [1, 6, 11]
    assert grams(np.array([0, 1, 2]), 0, 4).tolist() == [0, 0, 0, 0]
    assert grams(np.array([1]), 3, 4).tolist() == []


def test_counts_and_probabilities_by_hand() -> None:
    model = CountModel.of([ABAAB, BA], order=2, vocabulary=2, weight=2)
    assert [table.tolist() for table in model.tables] == [[[4, 3]], [[1, 2], [2, 0]], [[0, 1], [1, 0], [1, 0], [0, 0]]]
    half = Fraction(1, 2)
    p0 = {0: (4 + 2 * half) / 9, 1: (3 + 2 * half) / 9}
    p1 = {(0, 1): (2 + 2 * p0[1]) / 5, (1, 1): (0 + 2 * p0[1]) / 4, (1, 0): (2 + 2 * p0[0]) / 4}
    p2 = {(0, 1, 1): (0 + 2 * p1[1, 1]) / 3, (1, 1, 0): (0 + 2 * p1[1, 0]) / 2}
    found_KN = model.probabilities(np.array([0, 1, 1, 0]))
    expected = [
        [p0[0], p0[1], p0[1], p0[0]],
        [p0[0], p1[0, 1], p1[1, 1], p1[1, 0]],
        [p0[0], p1[0, 1], p2[0, 1, 1], p2[1, 1, 0]],
    ]
    assert found_KN.tolist() == [pytest.approx([float(p) for p in row], abs=1e-15) for row in expected]


def test_every_order_is_a_distribution() -> None:
    rng = np.random.default_rng(0)
    model = CountModel.of([rng.integers(4, size=300)], order=3, vocabulary=4, weight=5)
    total = sum(model.probabilities(np.array([2, 0, 1, last]))[:, -1] for last in range(4))
    assert total == pytest.approx(np.ones(4))


def test_a_sequence_shorter_than_the_context() -> None:
    model = CountModel.of([ABAAB], order=4, vocabulary=2)
    assert model.probabilities(np.array([1])).shape == (5, 1)
    assert model.tables[4].sum() == 1
    assert CountModel.of([BA], order=4, vocabulary=2).tables[3].sum() == 0


@pytest.mark.parametrize("order", [0, 1, 2])
def test_samples_follow_the_probabilities(order: int) -> None:
    model = CountModel.of([ABAAB, BA], order=2, vocabulary=2, weight=1)
    rows_RT = model.sample(20_000, 3, order, np.random.default_rng(1))
    for code in range(8):
        row = np.array([code >> 2, code >> 1 & 1, code & 1])
        expected = model.probabilities(row)[order].prod()
        share = (rows_RT == row).all(1).mean()
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000), row
