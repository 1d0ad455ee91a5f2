"""Rules that take back: their laws enumerated, what they take back and when, and the shadows that two of them ask.

Shapes: B rows, T positions, V vocabulary, S = V^T sequences, Z = (V + 1)^T states of the chain.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from chains import (
    HOLE,
    TINY,
    Z_ZT,
    Given,
    Guess,
    State,
    ancestral_law,
    chosen_law,
    copies,
    distance,
    guesses,
    hot,
    law,
    masked_noise,
    moved_law,
    of_sequences,
    unmask,
)
from dlm.errors import InputError
from dlm.models.transformer import Transformer, TransformerConfig
from dlm.noise import process, schedule
from dlm.noise.masked import MaskedNoise
from dlm.protocols import Rule, Step
from dlm.sampling import choice
from dlm.sampling.diffusion import DiffusionSampler
from dlm.sampling.draw import Draw, generators
from dlm.sampling.remasking import KINDS, Planned, Remask, Revoke
from dlm.sampling.rules import Ancestral, TopScore
from dlm.trajectory import Canvas, Frame
from oracle import BayesDenoiser, Noted, Tiny, chi_square_of_counts, chi_square_p

MASK = TINY.mask_id
PEAKED = Tiny(3, 4, seed=0, concentration=0.2)


def held(t: float) -> float:
    """The times of `loop`: down to 0.1 in the first third, there in the second, to 0 in the last."""
    if t > 2 / 3:
        return 0.1 + (t - 2 / 3) / (1 / 3) * 0.9
    return 0.1 if t > 1 / 3 - 1e-9 else t / (1 / 3) * 0.1


def levels(kind: str, eta: float, noise: Any, t: float, s: float) -> tuple[float, float, float]:
    """(alpha_t, alpha_s, sigma), sigma of a whole row for `conf` (2503.00307, section 4)."""
    at, to = (held(t), held(s)) if kind == "loop" else (t, s)
    alpha_t, alpha_s = (float(noise.schedule.alpha(torch.tensor(x, dtype=torch.float64))) for x in (at, to))
    most = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
    inside = kind != "loop" or (s > 1 / 3 - 1e-9 and t < 2 / 3 + 1e-9)
    return alpha_t, alpha_s, (min(eta, most) if kind in ("cap", "loop") else eta * most) * inside * (s > 0)


def revealed(alpha_t: float, alpha_s: float, sigma: float) -> float:
    return (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)


def remasked(kind: str, eta: float, noise: Any, mu_ZTV: Tensor, t: float, s: float, left: int) -> Tensor:
    alpha_t, alpha_s, sigma = levels(kind, eta, noise, t, s)
    reveal = revealed(alpha_t, alpha_s, sigma) if left > 1 else 1.0
    mask_V = hot(torch.tensor(MASK))
    visible_ZTV = (1 - sigma) * hot(Z_ZT) + sigma * mask_V
    return torch.where((Z_ZT == MASK)[..., None], reveal * mu_ZTV + (1 - reveal) * mask_V, visible_ZTV)


def surest_law(eta: float, steps: int, word: str = "linear") -> Tensor:
    """Probabilities (S,) of `conf`, whose state is the text with the confidence at which each token was written."""
    noise, guess = masked_noise(TINY, word), guesses(TINY)
    states: dict[tuple[State, tuple[float, ...]], float] = {((MASK,) * TINY.length, (math.inf,) * TINY.length): 1.0}
    for k in range(steps):
        alpha_t, alpha_s, sigma = levels("conf", eta, noise, 1 - k / steps, 1 - (k + 1) / steps if k + 1 < steps else 0.0)
        reveal, after = revealed(alpha_t, alpha_s, 0.0) if k + 1 < steps else 1.0, defaultdict[Any, float](float)
        for (z, sure), mass in states.items():
            weight, mu = [math.exp(-p) for p in sure], guess(z)
            ways: list[list[tuple[int, float, float]]] = []
            for i, token in enumerate(z):
                if token == MASK:
                    ways.append([(x, p, reveal * p) for x, p in enumerate(mu[i][:MASK])] + [(MASK, math.inf, 1 - reveal)])
                else:
                    back = sigma * weight[i] / sum(weight)
                    ways.append([(token, sure[i], 1 - back), (MASK, math.inf, back)])
            for way in itertools.product(*ways):
                chance = math.prod(p for *_, p in way)
                if chance > 0:
                    after[tuple(x for x, *_ in way), tuple(p for _, p, _ in way)] += mass * chance
        states = after
    law_z: dict[State, float] = defaultdict(float)
    for (z, _), mass in states.items():
        law_z[z] += mass
    return of_sequences(law_z, TINY)


def doubted(threshold: float, keep: float, z: State, drawn: dict[int, int], left: int, last: State | None) -> State:
    """`Revoke`: the sure masks are written, then fewer than were written are taken back, the unlikeliest first."""
    guess = posterior()
    surest = sorted(drawn, key=lambda i: -max(guess(z)[i]))
    count = max(sum(max(guess(z)[i]) >= threshold for i in drawn), math.ceil(len(drawn) / left))
    likely = {i: guess((*z[:i], MASK, *z[i + 1 :]))[i][token] for i, token in enumerate(z) if token != MASK}
    doubtful = sorted((i for i in likely if likely[i] < keep), key=lambda i: likely[i])
    dropped = doubtful[: max(count - 1, 0)] if left > 1 else []
    return tuple(drawn[i] if i in surest[:count] else MASK if i in dropped else token for i, token in enumerate(z))


def planned(eta: float, steps: int, z: State, drawn: dict[int, int], left: int, last: State | None) -> State:
    """`Planned` with alpha = 1 - t: the best of all tokens, drawn and standing, as many as the grid says."""
    guess, text = posterior(), tuple(drawn.get(i, token) for i, token in enumerate(z))
    score = {i: math.log(max(guess((*z[:i], MASK, *z[i + 1 :]))[i][token], 1e-300)) for i, token in enumerate(text)}
    order = sorted(score, key=lambda i: -score[i] * (1 if i in drawn else eta))
    kept = order[: -(-len(z) * (steps - left + 1) // steps)]
    return tuple(token if i in kept else MASK for i, token in enumerate(text))


@cache
def posterior() -> Any:
    return guesses(PEAKED)


def tiny_of(word: str) -> Tiny:
    return PEAKED if word.startswith(("revoke", "planner")) else TINY


@cache
def law_of(word: str, steps: int) -> Tensor:
    name, _, setting = word.partition(":")
    if name == "remdm-conf":
        return surest_law(float(setting), steps)
    if name == "revoke":
        return moved_law(PEAKED, steps, partial(doubted, float(setting), 0.9))
    if name == "planner":
        return moved_law(PEAKED, steps, partial(planned, float(setting), steps))
    return law(masked_noise(TINY), steps, partial(remasked, name.removeprefix("remdm-"), float(setting)))


LAWS = ["remdm-cap:0.3", "remdm-rescale:0.6", "remdm-conf:1", "remdm-loop:0.8", "revoke:0.4", "planner:1", "planner:0.2"]


@pytest.mark.parametrize("steps", [2, 3, 6])
@pytest.mark.parametrize("word", LAWS)
def test_every_rule_draws_its_law(word: str, steps: int) -> None:
    if (word, steps) == ("remdm-conf:1", 6):
        steps = 4  # it remembers, and the states are many
    tiny = tiny_of(word)
    samples = unmask(tiny, choice.make(word, Draw(), masked_noise(tiny)), steps, rows=2500)
    assert chi_square_p(samples, law_of(word, steps), tiny) > 1e-3

