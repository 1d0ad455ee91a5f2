"""Measures of generated text on cases with a known answer."""

from __future__ import annotations

import math

import pytest
import torch

from dlm.evaluation import generative
from dlm.evaluation.statistics import Mean
from dlm.noise.masked import MaskedNoise


def test_judge_bits_of_a_uniform_judge() -> None:
    bits = generative.judge_bits(MaskedNoise(5, 4), lambda z, t: torch.zeros(*z.shape, 5), torch.randint(4, (7, 9)))
    assert bits.value == pytest.approx(2.0)
    assert bits.stderr == pytest.approx(0.0, abs=1e-6)


def test_entropy_and_distinct() -> None:
    samples = torch.tensor([[0, 1, 0, 1, 0, 1], [2, 3, 2, 3, 2, 3]])
    assert generative.unigram_entropy(samples) == pytest.approx(2.0)
    assert generative.distinct(samples, 2) == pytest.approx(4 / 10)
    assert generative.distinct(torch.arange(12).view(2, 6), 4) == 1.0
    assert generative.unigram_entropy(torch.zeros(3, 3, dtype=torch.long)) == 0.0


def test_known_words_ignores_the_cut_ends() -> None:
    known = generative.vocabulary("To be or not to be, that's the question")
    assert generative.known_words(["xx to be that's qq zz"], known) == pytest.approx(3 / 4)
    assert generative.known_words(["one two"], known) == 0.0


def test_mean_states_its_error() -> None:
    mean = Mean.of(torch.tensor([1.0, 3.0]))
    assert mean.value == 2.0
    assert mean.stderr == pytest.approx(math.sqrt(2) / math.sqrt(2))
