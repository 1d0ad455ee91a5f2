"""Quotas of the reference samplers against the references' own recurrences, and the distribution that is scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.diffusion.transfer import QUOTAS, Origin, Transfer, narrow, without
from dlm.sampling.draw import Draw, generators

VOCAB = 8
NOISE = MaskedNoise(VOCAB, VOCAB - 1)


def step(left: int, steps_left: int, steps: int, logp_BTV: Tensor | None = None) -> Step:
    z_BT = torch.full((1, max(left, 1)), NOISE.mask_id)
    logp_BTV = NOISE.log_probs(torch.zeros(1, max(left, 1), VOCAB), z_BT) if logp_BTV is None else logp_BTV
    half_B = torch.full((1,), 0.5, dtype=torch.float64)
    return Step(z_BT, torch.ones_like(z_BT, dtype=torch.bool), logp_BTV, half_B, half_B / 2, torch.tensor([steps_left]), steps, NOISE)


def taken(quota: str, masks: int, steps: int) -> list[int]:
    """What the loop transfers: a step after the other until no mask is left."""
    counts: list[int] = []
    for done in range(steps):
        if masks == sum(counts):
            break
        counts.append(int(QUOTAS[quota](step(masks - sum(counts), steps - done, steps))))
    return counts


def llada(masks: int, steps: int) -> list[int]:
    return [masks // steps + (i < masks % steps) for i in range(steps)]


def dllm(masks: int, steps: int) -> list[int]:
    counts: list[int] = []
    for i in range(steps):
        left = torch.tensor(masks - sum(counts), dtype=torch.float64)
        counts.append(int(torch.round(left / (steps - i))))
    return [count for count in counts if count]


def dream(masks: int, steps: int) -> list[int]:
    t_N, counts = torch.linspace(1, 1e-3, steps + 1), []  # type: Tensor, list[int]
    for i in range(steps):
        left = torch.tensor(masks - sum(counts), dtype=torch.float32)
        counts.append(int(left * (1 - t_N[i + 1] / t_N[i])) if i < steps - 1 else int(left))
        if sum(counts) == masks:
            break
    return counts


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16, 64, 130])
def test_quotas_are_those_of_the_references(steps: int) -> None:
    for masks in (1, 2, 5, 16, 31, 32, 100):
        assert taken("even", masks, steps) == [count for count in llada(masks, steps) if count]
        assert taken("rounded", masks, steps) == dllm(masks, steps)
        assert taken("by-time", masks, steps) == dream(masks, steps)


def test_quotas_differ() -> None:
    assert len({tuple(taken(quota, 16, 6)) for quota in QUOTAS}) == 3


def test_top_p_narrows_before_top_k() -> None:
    """0.4, 0.3, 0.2, 0.1 at top_p 0.95 keeps all, at 0.6 two; a top-k of 3 leaves those two."""
    logp_BTV = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]).log()
    assert narrow(logp_BTV, Draw(0.0, 3, 0.6)).exp()[0, 0].tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert narrow(logp_BTV, Draw(0.0, 3, 1.0)).exp()[0, 0].tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert narrow(logp_BTV, Draw(0.5)).exp()[0, 0].tolist() == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30])


def test_excluded_tokens() -> None:
    logp_BTV = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
    assert without(logp_BTV, (0,)).exp()[0, 0].tolist() == pytest.approx([0, 0.5, 0.5])
    certain_BTV = torch.tensor([[[1.0, 0.0, 0.0]]]).log()
    assert torch.equal(without(certain_BTV, (0,)), certain_BTV)


def test_tokens_that_come_last_are_written_in_the_end() -> None:
    p_TV = torch.full((3, VOCAB), 0.01)
    p_TV[0, 0], p_TV[1, 1], p_TV[2, 0] = 0.9, 0.3, 0.8
    logp_BTV = (p_TV / p_TV.sum(-1, keepdim=True)).log()[None]
    rule = Transfer(last=(0,), draw=Draw(0.0))
    assert rule(step(3, 3, 3, logp_BTV), generators(0, 1))[0].tolist() == [7, 1, 7]
    assert rule(step(3, 1, 3, logp_BTV), generators(0, 1))[0].tolist() == [0, 1, 0]


def test_origin_writes_everything_in_its_last_step() -> None:
    assert NOISE.mask_id not in Origin()(step(20, 1, 10), generators(0, 1))
    share = torch.stack([Origin()(step(100, 10, 10), generators(seed, 1)) != NOISE.mask_id for seed in range(50)]).double().mean()
    assert float(share) == pytest.approx(0.1, abs=0.02)  # 1 - s / t of the first of ten steps


@pytest.mark.parametrize("settings", [{"quota": "all"}, {"score": "best"}, {"score_temperature": -1.0}])
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Transfer(**settings)
