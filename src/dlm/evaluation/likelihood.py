"""Negative log-likelihood of a text, or the bound on it, with its Monte-Carlo error.

The text is cut into whole windows side by side, each predicted from its own first token on, so that a diffusion model and its
autoregressive baseline are scored on the same tokens. Shapes: W windows, R passes, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from dlm import seeds
from dlm.errors import InputError
from dlm.evaluation.statistics import standard_error
from dlm.noise import loss
from dlm.noise.classes import ClassNoise
from dlm.noise.gaussian import GaussianNoise
from dlm.noise.masked import MaskedNoise
from dlm.noise.replacement import ReplacementNoise
from dlm.noise.score import ScoreNoise
from dlm.protocols import BoundedProcess, NoiseProcess

TWO_CLOCKS = "two-clocks"
LEVELS: dict[str, Callable[..., Tensor]] = {
    "any-order": loss.any_order,
    "counted": loss.counted,
    TWO_CLOCKS: loss.two_clocks,
    "continuous": loss.continuous,
    "score-entropy": loss.score_entropy,
}
ESTIMATORS = ("auto", *LEVELS, "discrete")
BLOCKWISE, AUTOREGRESSIVE = "block-wise", "autoregressive"


@dataclass(frozen=True)
class Likelihood:
    """stderr: Monte-Carlo error of this number on this text (0 where it is exact); stderr_data: spread over its windows,
    the error as an estimate for other text of the kind. samples: Monte-Carlo passes. is_bound: the true value is at most this.
    parts: of the nats per token: of noise on vectors the prior, diffusion and reconstruction part, of noise of classes that of classes
    and that of words given their classes."""

    nats_per_token: float
    bits_per_char: float
    stderr: float
    stderr_data: float
    is_bound: bool
    estimator: str
    samples: int
    tokens: int
    characters: int
    parts: dict[str, float] | None = field(default=None, kw_only=True)


def resolve(estimator: str, noise: BoundedProcess, *, blocks: bool, reads_time: bool) -> str:
    """The estimator that a word means for this noise, `auto` resolved: any-order for masks, counted for replacement noise, two-clocks for
    classes, continuous for others and where the schedule does not run from 1 to 0; block-wise for block diffusion. InputError for one
    that is unknown or does not apply."""
    if estimator not in (*ESTIMATORS, BLOCKWISE):
        raise InputError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    if blocks and estimator not in ("auto", BLOCKWISE):
        raise InputError("block diffusion has one estimator, its own: leave --estimator away")
    if blocks:
        return BLOCKWISE
    if isinstance(noise, GaussianNoise):
        if estimator not in ("auto", "continuous"):
            raise InputError("noise on vectors has one estimator, --estimator continuous")
        return "continuous"
    if estimator in OF_NOISE and not isinstance(noise, OF_NOISE[estimator][0]):
        raise InputError(OF_NOISE[estimator][1])
    if estimator == "auto":
        estimator = _best(noise, reads_time=reads_time)
    if estimator in ("any-order", TWO_CLOCKS) and reads_time:
        raise InputError(f"the {estimator} form is for networks that do not read the time: use --estimator continuous")
    return estimator


OF_NOISE: dict[str, tuple[type, str]] = {
    "any-order": (MaskedNoise, "only masked noise has an any-order form: use --estimator counted"),
    "counted": (ReplacementNoise, "only replacement noise has a counted form: use --estimator any-order"),
    "score-entropy": (ScoreNoise, "score entropy is the bound of networks of scores, such as SEDD: use --estimator continuous"),
    TWO_CLOCKS: (ClassNoise, "only noise of classes has two clocks: leave --estimator away"),
}
"""The noise that an estimator needs, and what to say of another one."""


def _best(noise: BoundedProcess, *, reads_time: bool) -> str:
    """The estimator of least variance."""
    if isinstance(noise, ClassNoise) and not reads_time:
        return TWO_CLOCKS
    if not isinstance(noise, MaskedNoise | ReplacementNoise):
        return "continuous"  # which needs no more of a process than its protocol
    return loss.best(noise.schedule, masked=isinstance(noise, MaskedNoise), reads_time=reads_time).replace("_", "-")


Nats = Callable[[Tensor, Tensor], Tensor]
"""Windows (B, T), a time for each (B,) -> nats of each (B,)."""


def _nats(
    estimator: str,
    noise: BoundedProcess,
    predict: loss.Predict,
    rng: torch.Generator,
    steps: int,
    beside: loss.PredictBeside | None,
    block_length: int,
    told: list[Mapping[str, Tensor]],
) -> Nats:
    """One draw of the estimator. told: gets the parts of each (B,) by name, where it has some."""

    def free(x_BT: Tensor) -> Tensor:
        return torch.ones_like(x_BT, dtype=torch.bool)

    if estimator == AUTOREGRESSIVE:
        return lambda x_BT, _: loss.autoregressive(noise, predict, x_BT, free(x_BT))
    if beside is not None:
        assert isinstance(noise, MaskedNoise)
        return lambda x_BT, t_B: loss.blockwise(noise, beside, x_BT, free(x_BT), rng, block_length, t_B)
    if estimator == "discrete":
        return lambda x_BT, t_B: loss.discrete(cast(NoiseProcess, noise), predict, x_BT, free(x_BT), rng, steps, t_B)
    if isinstance(noise, GaussianNoise):

        def bound(x_BT: Tensor, t_B: Tensor) -> Tensor:
            found = loss.parts(noise, predict, x_BT, free(x_BT), rng, t_B)
            told.append({name.removesuffix("_B"): part_B for name, part_B in found._asdict().items()})
            return found.bound_B

        return bound
    if estimator == TWO_CLOCKS:

        def both(x_BT: Tensor, t_B: Tensor) -> Tensor:
            class_B, word_B = loss.two_clocks_parts(cast(ClassNoise, noise), predict, x_BT, free(x_BT), rng, t_B)
            told.append({"class": class_B, "word given class": word_B})
            return class_B + word_B

        return both
    return lambda x_BT, t_B: LEVELS[estimator](noise, predict, x_BT, free(x_BT), rng, t_B)


@torch.no_grad()
def evaluate(
    noise: BoundedProcess,
    predict: loss.Predict,
    windows_WT: Tensor,
    *,
    characters: int,
    estimator: str = "auto",
    passes: int = 4,
    steps: int = 256,
    seed: int = 0,
    batch: int = 32,
    beside: loss.PredictBeside | None = None,
    block_length: int = 0,
    reads_time: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Likelihood:
    """Average over all windows; `passes` independent draws of masks each. estimator `autoregressive` is exact, else as of `resolve`.

    beside and block_length: the bound of block diffusion instead (exact for blocks of 1). characters: how many the windows spell.
    progress is told the rows done. InputError as of `resolve`, for blocks that do not divide the window, and for a single pass.
    """
    windows, length = windows_WT.shape
    exact = estimator == AUTOREGRESSIVE or (beside is not None and block_length == 1)
    if estimator != AUTOREGRESSIVE:
        estimator = resolve(estimator, noise, blocks=beside is not None, reads_time=reads_time)
    if beside is not None and (block_length < 1 or length % block_length):
        raise InputError(f"blocks of {block_length} do not divide the window of {length}")
    if not exact and passes < 2:
        raise InputError("the error of a Monte-Carlo estimate needs at least 2 passes")
    passes = 1 if exact else passes
    rng = seeds.generator(seed, windows_WT.device)
    told: list[Mapping[str, Tensor]] = []
    nats_of = _nats(estimator, noise, predict, rng, steps, beside, block_length, told)
    nats_RW = torch.zeros(passes, windows, dtype=torch.float64)
    # every window sees the levels (u + r/R) mod 1 over its passes, and a batch spreads over the levels too
    offset_W = torch.rand(windows, generator=rng, device=rng.device, dtype=torch.float64)
    for r in range(passes):
        for begin in range(0, windows, batch):
            part = slice(begin, begin + batch)
            nats_RW[r, part] = nats_of(windows_WT[part], (offset_W[part] + r / passes) % 1.0).double().cpu() / length
            progress(len(windows_WT[part]))
    mean_W = nats_RW.mean(0)
    nats = mean_W.mean().item()
    # windows are independent given the text; stratified levels within one only lower the true error below this
    stderr = 0.0 if exact else (nats_RW.var(0) / passes).sum().sqrt().item() / windows
    bits = nats * windows * length / characters / math.log(2)
    parts = {name: float(torch.cat([one[name] for one in told]).mean()) / length for name in told[0]} if told else None
    error = float(standard_error(mean_W))
    return Likelihood(nats, bits, stderr, error, not exact, estimator, passes, windows * length, characters, parts=parts)
