"""Spectra, rhythm and reading frames on sequences whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from dlm.evaluation import genomes


def row(text: str) -> np.ndarray:
    return np.array(["ACGT".index(base) for base in text])


def test_spectra_and_their_divergence() -> None:
    a, b = row("ACAC")[None], row("GTGT")[None]
    assert genomes.spectrum(a, 2).nonzero()[0].tolist() == [1, 4]
    assert genomes.spectrum(a, 2)[[1, 4]] == pytest.approx([2 / 3, 1 / 3])
    assert genomes.divergence(a, b, 1) == pytest.approx(1)
    assert genomes.divergence(a, a, 2) == 0
    # one half against the mixture of it and three quarters: H(1/2, 1/2) mixed by hand
    assert genomes.divergence(row("AACC")[None], row("ACCC")[None], 1) == pytest.approx(0.0487949, abs=1e-6)


def test_a_kmer_lies_within_a_row() -> None:
    assert genomes.spectrum(np.stack([row("AA"), row("CC")]), 2).nonzero()[0].tolist() == [0, 5]


def test_period_3_is_seen_and_no_other() -> None:
    rng = np.random.default_rng(0)
    plain = rng.integers(4, size=(200, 300))
    assert genomes.rhythm(plain).mean() == pytest.approx(1, abs=0.25)
    codons = plain.copy()
    codons[:, ::3] = 2
    assert genomes.rhythm(codons).mean() > 20
    halves = plain.copy()
    halves[:, ::2] = 2
    assert genomes.rhythm(halves).mean() < 0.7  # the power of period 2 raises the mean
    assert genomes.powers(halves).mean(0).argmax() == 149  # 1 / 300 is the first
    assert genomes.powers(halves).mean(1) == pytest.approx(np.ones(200))


def test_frames_from_stop_to_stop() -> None:
    assert sorted(genomes.frame_lengths(row("CCCTAACCCCCCTGA")).tolist()) == sorted([1, 2, 0, 4, 4])
    assert sorted(genomes.frame_lengths(row("TAATAGTGA")).tolist()) == sorted([0, 0, 0, 0, 2, 2])
    assert genomes.frame_lengths(row("CTAGC")).tolist() == [1, 0, 0, 1]
    assert genomes.frame_lengths(row("C")).tolist() == [0, 0, 0]
