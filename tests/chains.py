"""Chains on a tiny distribution under every noise: what the tests of samplers run and enumerate.

Shapes: B rows, T positions, Z = (V + 1)^T states of the chain, the mask included.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlm.noise import process
from dlm.protocols import Rule
from dlm.sampling.diffusion import DiffusionSampler
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas, Frame
from oracle import ReplacementBayes, Tiny, dense

ROWS = 1200
TINY = Tiny(3, 3, seed=0)
Z_ZT = torch.tensor(list(itertools.product(range(TINY.vocab + 1), repeat=TINY.length)))
SETTINGS: dict[str, dict[str, Any]] = {
    "masked": {"process": "masked"},
    "uniform": {"process": "uniform"},
    "semantic": {"process": "semantic", "clusters": [0, 1, 0, 2, 1]},
    "hybrid": {"process": "hybrid", "share": 0.4},
}
REPLACING = ["uniform", "semantic", "hybrid"]
Given = tuple[int | None, ...]
HOLE: Given = (None,) * TINY.length


def noise_of(name: str, schedule: str = "linear", vocab: int = TINY.vocab, **more: Any) -> Any:
    settings = SETTINGS[name] | {"schedule": schedule} | more
    if "clusters" in settings:
        settings["clusters"] = [*settings["clusters"][:vocab], 1 + max(settings["clusters"][:vocab])]
    return process.make(settings, vocab + 1, vocab)


def hot(x: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(x, TINY.vocab + 1).double()


def prior_of(noise: Any) -> Tensor:
    """What the schedule leaves of x at t = 1 is taken as uniform, or as masked."""
    return hot(torch.tensor(TINY.mask_id)) if noise == noise_of("masked") else dense(noise, 1.0)[: TINY.vocab].mean(0)


def bayes(noise: Any, which: str = "leave-one-out") -> ReplacementBayes:
    return ReplacementBayes(TINY, partial(dense, noise), which)


def copies(row: Given | list[int | None], fill: int, rows: int) -> Canvas:
    """One row, many times."""
    one = Canvas.from_rows([list(row)], fill=fill)
    return Canvas(*(x.repeat(rows, 1) for x in (one.tokens_BT, one.free_BT, one.valid_BT)))


def sample(noise: Any, rule: Rule, steps: int, given: Given = HOLE, rows: int = ROWS, **options: Any) -> list[Frame]:
    sampler = DiffusionSampler(bayes(noise), noise, TINY.length, rule, steps, **options)
    frames = list(sampler.steps(copies(given, TINY.mask_id, rows), rng=generators(0, rows)))
    assert frames[-1].settled_BT.all()
    return frames
