"""Chains on a tiny distribution under every noise: what the tests of samplers run and enumerate.

Shapes: B rows, T positions, V vocabulary, S = V^T sequences, Z = (V + 1)^T states of the chain, the mask included.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.noise import process, schedule
from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import Rule
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame
from oracle import BayesDenoiser, ReplacementBayes, Tiny, dense

ROWS = 1200
TINY = Tiny(3, 3, seed=0)
Z_ZT = torch.tensor(list(itertools.product(range(TINY.vocab + 1), repeat=TINY.length)))
SETTINGS: dict[str, dict[str, Any]] = {
    "masked": {"process": "masked"},
    "uniform": {"process": "uniform"},
    "semantic": {"process": "semantic", "clusters": [0, 1, 0, 2, 1]},
    "hybrid": {"process": "hybrid", "share": 0.4},
    "gidd": {"process": "gidd", "p_uniform": 0.3},
    "classes": {"process": "classes", "clusters": [0, 1, 0]},
}
REPLACING = ["uniform", "semantic", "hybrid", "gidd"]
Given = tuple[int | None, ...]
HOLE: Given = (None,) * TINY.length


def noise_of(name: str, schedule: str = "linear", vocab: int = TINY.vocab, **more: Any) -> Any:
    settings = SETTINGS[name] | {"schedule": schedule} | more
    if name == "classes":
        return process.make(settings, vocab + 3, vocab)
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


State = tuple[int, ...]
Guess = list[list[float]]
"""Probabilities (T, V) of one state."""
Move = Callable[[Any, Tensor, float, float, int], Tensor]
"""(noise, mu_ZTV, t, s, steps left) -> the law of the next token (Z, T, V); positions are drawn apart from each other."""


def law(noise: Any, steps: int, move: Move, given: Given = HOLE, shape: Callable[[Tensor], Tensor] = lambda mu: mu) -> Tensor:
    """Probabilities (S,) of what a rule leaves: prior noise, then `steps` moves, state by state."""
    start_TV = torch.stack([prior_of(noise) if x is None else hot(torch.tensor(x)) for x in given])
    free_T1 = torch.tensor([[x is None] for x in given])
    mass_Z = start_TV[torch.arange(TINY.length), Z_ZT].prod(-1)
    for k in range(steps):
        t, s = 1 - k / steps, max(0.0, 1 - (k + 1) / steps)
        times_Z = torch.full((len(Z_ZT),), t, dtype=torch.float64)
        mu_ZTV = shape(noise.log_probs(bayes(noise)(Z_ZT, times_Z), Z_ZT, times_Z).exp())
        next_ZTV = torch.where(free_T1, move(noise, mu_ZTV, t, s, steps - k), hot(Z_ZT))
        mass_Z = mass_Z @ torch.stack([next_ZTV[:, i, Z_ZT[:, i]] for i in range(TINY.length)]).prod(0)
    return of_sequences({tuple(z): float(p) for z, p in zip(Z_ZT.tolist(), mass_Z, strict=True)}, TINY)


def of_sequences(mass: dict[State, float], tiny: Tiny) -> Tensor:
    """Probabilities (S,), which must be all there is."""
    law_S = torch.tensor([mass.get(tuple(x), 0.0) for x in tiny.x_ST.tolist()], dtype=torch.float64)
    assert float(law_S.sum()) == pytest.approx(1.0)
    return law_S


def distance(law_S: Tensor, tiny: Tiny) -> float:
    """Total variation to the data."""
    return float((law_S - tiny.p_S).abs().sum() / 2)


def masked_noise(tiny: Tiny, word: str = "linear") -> MaskedNoise:
    return MaskedNoise(tiny.vocab + 1, tiny.mask_id, schedule.parse(word))


def unmask(
    tiny: Tiny, rule: Rule, steps: int, *, word: str = "linear", given: Given = (), rows: int = 4000, denoiser: Any = None, **options: Any
) -> Tensor:
    """int64 (rows, T), with the Bayes denoiser unless another is given."""
    canvas = copies(list(given) or [None] * tiny.length, tiny.mask_id, rows)
    sampler = DiffusionSampler(denoiser or BayesDenoiser(tiny), masked_noise(tiny, word), tiny.length, rule, steps, **options)
    *_, frame = sampler.steps(canvas, rng=generators(0, rows))
    assert frame.settled_BT.all()
    return frame.tokens_BT


def start_of(tiny: Tiny, given: Given) -> State:
    return tuple(tiny.mask_id if x is None else x for x in given) or (tiny.mask_id,) * tiny.length


def ancestral_law(tiny: Tiny, steps: int, word: str = "linear", given: Given = ()) -> Tensor:
    """Probabilities (S,) of the reverse chain of `steps` equal steps, by its transition matrices."""
    noise, grid = masked_noise(tiny, word), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    z_ZT = torch.tensor(list(itertools.product(range(tiny.vocab + 1), repeat=tiny.length)))
    mass_Z = (z_ZT == torch.tensor(start_of(tiny, given))).all(-1).double()
    logp_ZTV = noise.log_probs(BayesDenoiser(tiny)(z_ZT), z_ZT)
    for k in range(steps):
        t, s = (grid[i].expand(len(z_ZT)) for i in (k, k + 1))
        move_ZTV = noise.posterior(logp_ZTV, z_ZT, t, s)
        if k == steps - 1:
            move_ZTV = logp_ZTV.exp()  # a schedule that ends above alpha = 1 leaves no mask either
        chance_ZZ = torch.stack([move_ZTV[:, i, z_ZT[:, i]] for i in range(tiny.length)]).prod(0)
        mass_Z = mass_Z @ chance_ZZ
    return of_sequences({tuple(z): float(p) for z, p in zip(z_ZT.tolist(), mass_Z, strict=True)}, tiny)


def guesses(tiny: Tiny, denoiser: Any = None, draw: Draw | None = None) -> Callable[[State], Guess]:
    """State -> p(x_i | z), tokens certain, each state asked once."""

    @cache
    def guess(z: State) -> Guess:
        z_1T = torch.tensor([z])
        logp_1TV = masked_noise(tiny).log_probs((denoiser or BayesDenoiser(tiny))(z_1T, torch.zeros(1)), z_1T)
        probs: Guess = (draw or Draw()).shape(logp_1TV)[0].exp().tolist()
        return probs

    return guess


def any_order_law(tiny: Tiny, denoiser: Any, given: Given = (), draw: Draw | None = None, block_length: int = 0) -> Tensor:
    """Probabilities (S,) of one token a call in random order, by enumerating orders and tokens.

    block_length: blocks come from left to right, and the order is random in each; 0 is one block.
    """
    guess, length = guesses(tiny, denoiser, draw), block_length or tiny.length

    @cache
    def finish(z: State) -> dict[State, float]:
        masked = [i for i, token in enumerate(z) if token == tiny.mask_id]
        masked = [i for i in masked if i // length == masked[0] // length]
        ends: dict[State, float] = defaultdict(float, {} if masked else {z: 1.0})
        for i, token in itertools.product(masked, range(tiny.vocab)):
            for end, share in finish((*z[:i], token, *z[i + 1 :])).items():
                ends[end] += guess(z)[i][token] * share / len(masked)
        return ends

    return of_sequences(finish(start_of(tiny, given)), tiny)


def moved_law(tiny: Tiny, steps: int, move: Callable[[State, dict[int, int], int, State | None], State], remembers: bool = False) -> Tensor:
    """Probabilities (S,) of a rule that draws every mask and is certain of the rest: `move(z, drawn, steps left, last z)` is the next z.

    remembers: whether `move` is told the state of the last step, which is None in the first.
    """
    guess = guesses(tiny)

    @cache
    def finish(z: State, left: int, last: State | None) -> dict[State, float]:
        if not left:
            return {z: 1.0}
        masked, ends = [i for i, token in enumerate(z) if token == tiny.mask_id], defaultdict[State, float](float)
        for tokens in itertools.product(range(tiny.vocab), repeat=len(masked)):
            drawn, chance = dict(zip(masked, tokens, strict=True)), 1.0
            for i, token in drawn.items():
                chance *= guess(z)[i][token]
            if chance > 0:
                for end, share in finish(move(z, drawn, left, last), left - 1, z if remembers else None).items():
                    ends[end] += chance * share
        return ends

    return of_sequences(finish((tiny.mask_id,) * tiny.length, steps, None), tiny)


Choose = Callable[[list[int], Guess, dict[int, int], int, Guess | None], list[int]]
"""(masks, their guess, what is drawn there, steps left, the guess in the last step) -> the masks that are written."""


def chosen_law(tiny: Tiny, steps: int, choose: Choose, remembers: bool = False) -> Tensor:
    """Probabilities (S,) of a rule that draws every mask and keeps those that `choose` names."""
    guess = guesses(tiny)

    def move(z: State, drawn: dict[int, int], left: int, last: State | None) -> State:
        kept = choose(list(drawn), guess(z), drawn, left, guess(last) if last else None) if drawn else []
        return tuple(drawn[i] if i in kept else token for i, token in enumerate(z))

    return moved_law(tiny, steps, move, remembers)
