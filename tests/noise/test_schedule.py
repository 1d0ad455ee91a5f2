"""Every schedule: decreasing, derivative and inverse consistent with the value, end points as stated."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlm.noise import schedule

WORDS = ["linear", "polynomial", "polynomial:0.5", "polynomial:3", "cosine", "geometric", "geometric:0.01,5", "log-linear"]
ENDS = {"geometric": (math.exp(-1e-5), math.exp(-20)), "geometric:0.01,5": (math.exp(-0.01), math.exp(-5)), "log-linear": (1, 1e-3)}


@pytest.mark.parametrize("word", WORDS)
def test_ends_and_monotone(word: str) -> None:
    s = schedule.parse(word)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha = s.alpha(t)
    assert (alpha.diff() < 0).all()
    assert (alpha[0].item(), alpha[-1].item()) == pytest.approx(ENDS.get(word, (1.0, 0.0)), abs=1e-15)


@pytest.mark.parametrize("word", WORDS)
@given(value=st.floats(0.01, 0.99))
def test_derivative_and_inverse(word: str, value: float) -> None:
    s = schedule.parse(word)
    t = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(s.alpha(t), t)
    assert s.dalpha(t.detach()).item() == pytest.approx(slope.item(), rel=1e-9)
    alpha = s.alpha(t.detach())
    if alpha < 1 - 1e-4:  # nearer to 1 float64 has too few digits left to invert
        assert s.inverse(alpha).item() == pytest.approx(value, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["quadratic", "polynomial:-1", "polynomial:a", "geometric:3,1", "linear:1", "log-linear:2"])
def test_bad_words_are_told(word: str) -> None:
    with pytest.raises(ValueError, match="schedule"):
        schedule.parse(word)
