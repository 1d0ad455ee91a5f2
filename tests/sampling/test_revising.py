"""Rules that may change a token again: their laws enumerated with transition matrices, and what they promise on any canvas.

Shapes: B rows, T positions, V vocabulary, S = V^T sequences, Z = (V + 1)^T states of the chain, the mask included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.noise import process
from dlm.protocols import Rule, Step
from dlm.sampling import choice
from dlm.sampling.diffusion import DiffusionSampler
from dlm.sampling.draw import Draw, categorical, generators, uniform
from dlm.sampling.revising import ChangeWorst, EntropyBound, GreedyTail, PredictorCorrector, Refine, Reverse
from dlm.sampling.rules import Ancestral
from dlm.trajectory import Canvas, Frame, Trajectory
from oracle import Noted, ReplacementBayes, Tiny, chi_square_p, dense, dense_move

ROWS = 3000
TINY = Tiny(3, 3, seed=0)
SETTINGS: dict[str, dict[str, Any]] = {
    "masked": {"process": "masked"},
    "uniform": {"process": "uniform"},
    "semantic": {"process": "semantic", "clusters": [0, 1, 0, 2, 1, 3]},
    "hybrid": {"process": "hybrid", "share": 0.4},
}
REPLACING = ["uniform", "semantic", "hybrid"]
RULES: dict[str, Rule] = {
    "reverse": Reverse(),
    "cold": Reverse(Draw(0.0)),
    "truncated": Reverse(Draw(0.7, top_k=3)),
    "corrected": PredictorCorrector(0.5),
    "refine": Refine(),
    "entropy": EntropyBound(2.0),
    "worst": ChangeWorst(3.0),
    "greedy": GreedyTail(Reverse(), 2),
}
Move = Callable[[Tensor, Tensor, float, float], Tensor]
"""(mu_ZTV, z_ZT, t, s) -> the law of the next token at each position (Z, T, V), which are drawn apart from each other."""


def noise_of(name: str, schedule: str = "linear", vocab: int = TINY.vocab) -> Any:
    settings = SETTINGS[name] | {"schedule": schedule}
    if "clusters" in settings:
        settings["clusters"] = [*SETTINGS[name]["clusters"][:vocab], max(SETTINGS[name]["clusters"][:vocab]) + 1]
    return process.make(settings, vocab + 1, vocab)


def bayes(noise: Any) -> ReplacementBayes:
    return ReplacementBayes(TINY, partial(dense, noise))


def sample(noise: Any, rule: Rule, steps: int, given: tuple[int | None, ...] = (None,) * 3, **options: Any) -> list[Frame]:
    one = Canvas.from_rows([list(given)], fill=TINY.mask_id)
    canvas = Canvas(*(x.repeat(ROWS, 1) for x in (one.tokens_BT, one.free_BT, one.valid_BT)))
    sampler = DiffusionSampler(bayes(noise), noise, TINY.length, rule, steps, **options)
    frames = list(sampler.steps(canvas, rng=generators(0, ROWS)))
    assert frames[-1].settled_BT.all()
    return frames


def back(noise: Any, mu_ZTV: Tensor, z_ZT: Tensor, t: float, s: float) -> Tensor:
    """p(z_s | z_t) with mu in place of x, and p(x | z) for s = 0; states that cannot be are 0."""
    into_ZTV = (dense_move(noise, s, t) if s > 0 else dense(noise, t))[:, z_ZT].permute(1, 2, 0)
    joint_ZTV = into_ZTV.clamp(min=0) * (mu_ZTV @ dense(noise, s) if s > 0 else mu_ZTV)
    return (joint_ZTV / joint_ZTV.sum(-1, keepdim=True)).nan_to_num()


def law(noise: Any, steps: int, move: Move, given: tuple[int | None, ...] = (None,) * 3, temperature: float = 1.0) -> Tensor:
    """Probabilities (S,) of what a rule leaves: prior noise, then `steps` moves, state by state."""
    z_ZT = torch.tensor(list(itertools.product(range(TINY.vocab + 1), repeat=TINY.length)))
    one_hot_ZTV, denoiser = torch.nn.functional.one_hot(z_ZT, TINY.vocab + 1).double(), bayes(noise)
    prior_V = dense(noise, 1.0)[: TINY.vocab].mean(0)  # what a schedule leaves of x at t = 1 is taken as uniform
    if type(noise).__name__ == "MaskedNoise":
        prior_V = torch.eye(TINY.vocab + 1, dtype=torch.float64)[-1]
    start_TV = torch.stack([prior_V if x is None else torch.eye(TINY.vocab + 1, dtype=torch.float64)[x] for x in given])
    free_T = torch.tensor([x is None for x in given])
    mass_Z = start_TV[torch.arange(TINY.length), z_ZT].prod(-1)
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        times_Z = torch.full((len(z_ZT),), t, dtype=torch.float64)
        mu_ZTV = noise.log_probs(denoiser(z_ZT, times_Z), z_ZT, times_Z).exp() ** (1 / temperature)
        next_ZTV = torch.where(free_T[:, None], move(mu_ZTV / mu_ZTV.sum(-1, keepdim=True), z_ZT, t, max(s, 0.0)), one_hot_ZTV)
        mass_Z = mass_Z @ torch.stack([next_ZTV[:, i, z_ZT[:, i]] for i in range(TINY.length)]).prod(0)
    done_Z = (z_ZT != TINY.mask_id).all(-1)
    law_S = torch.zeros(len(TINY.p_S), dtype=torch.float64)
    law_S[TINY.index(z_ZT[done_Z])] = mass_Z[done_Z]
    assert float(law_S.sum()) == pytest.approx(1.0)
    return law_S


def corrected(noise: Any, corrector: float, mu_ZTV: Tensor, z_ZT: Tensor, t: float, s: float) -> Tensor:
    below = max(0.0, s - corrector * (t - s))
    law_ZTV = back(noise, mu_ZTV, z_ZT, t, below)
    return law_ZTV @ dense_move(noise, below, s) if s > 0 else law_ZTV


def refined(noise: Any, mu_ZTV: Tensor, z_ZT: Tensor, t: float, s: float) -> Tensor:
    return back(noise, mu_ZTV, z_ZT, t, 0.0)


def explained(noise: Any, mu_ZTV: Tensor, z_ZT: Tensor, open_T: Tensor) -> Tensor:
    """p(x | z) at the level t whose share of noise 1 - alpha is the share of tokens expected to be wrong: by bisection."""

    def wrong(t: float) -> tuple[Tensor, Tensor]:
        law_ZTV = back(noise, mu_ZTV, z_ZT, t, 0.0)
        stays_ZT = law_ZTV.gather(-1, z_ZT[..., None]).squeeze(-1)
        return law_ZTV, (1 - stays_ZT)[:, open_T].mean(-1)

    raise NotImplementedError(wrong)


def distance(law_S: Tensor) -> float:
    return float((law_S - TINY.p_S).abs().sum() / 2)
