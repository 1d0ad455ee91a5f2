"""Negative log-likelihood of a text, or the bound on it, with its Monte-Carlo error.

The text is cut into whole windows side by side, each predicted from its own first token on, so that a diffuser and its
autoregressive twin are asked for the same tokens. Shapes: W windows, R passes, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.evaluation.statistics import standard_error
from dlm.noise import loss
from dlm.noise.masked import MaskedNoise
from dlm.noise.replacement import ReplacementNoise
from dlm.protocols import NoiseProcess

LEVELS: dict[str, Callable[..., Tensor]] = {"any-order": loss.any_order, "counted": loss.counted, "continuous": loss.continuous}
ESTIMATORS = ("auto", *LEVELS, "discrete")
BLOCKWISE = "block-wise"


@dataclass(frozen=True)
class Likelihood:
    """stderr: Monte-Carlo error of this number on this text (0 where it is exact); stderr_data: spread over its windows,
    the error as an estimate for other text of the kind. is_bound: the true value is at most this."""

    nats_per_token: float
    bits_per_char: float
    stderr: float
    stderr_data: float
    is_bound: bool
    estimator: str
    samples: int
    tokens: int
    characters: int

    def record(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    noise: NoiseProcess,
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
    progress: Callable[[int], None] = lambda rows: None,
) -> Likelihood:
    """Average over all windows; `passes` independent draws of masks each. estimator `autoregressive` is exact;
    `auto` is any-order for masks, else counted, or continuous where the schedule does not run from 1 to 0. beside and block_length: the
    bound of block diffusion instead (exact for blocks of 1).

    characters: how many the windows spell. progress is told the rows done. InputError for an unknown estimator.
    """
    exact = estimator == "autoregressive"
    if not exact and estimator not in (*ESTIMATORS, BLOCKWISE):
        raise InputError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    if estimator == "any-order" and not isinstance(noise, MaskedNoise):
        raise InputError("only masked noise has an any-order form: use --estimator counted")
    if estimator == "counted" and not isinstance(noise, ReplacementNoise):
        raise InputError("only replacement noise has a counted form: use --estimator any-order")
    if beside is not None and estimator == "auto":
        estimator = BLOCKWISE
    if estimator == "auto":
        estimator = loss.best(noise.schedule, masked=isinstance(noise, MaskedNoise), reads_time=reads_time).replace("_", "-")
    if estimator == "any-order" and reads_time:
        raise InputError("the any-order form is for networks that do not read the time: use --estimator continuous")
    if beside is not None:
        if estimator != BLOCKWISE:
            raise InputError("block diffusion has one estimator, its own: leave --estimator away")
        if block_length < 1 or windows_WT.shape[1] % block_length:
            raise InputError(f"blocks of {block_length} do not divide the window of {windows_WT.shape[1]}")
        exact = block_length == 1
    if not exact and passes < 2:
        raise InputError("the error of a Monte-Carlo estimate needs at least 2 passes")
    passes = 1 if exact else passes
    rng = torch.Generator(windows_WT.device).manual_seed(seed)
    windows, length = windows_WT.shape
    nats_RW = torch.zeros(passes, windows, dtype=torch.float64)
    # every window sees the levels (u + r/R) mod 1 over its passes, and a batch spreads over the levels too
    offset_W = torch.rand(windows, generator=rng, device=rng.device, dtype=torch.float64)
    for r in range(passes):
        for begin in range(0, windows, batch):
            x_BT = windows_WT[begin : begin + batch]
            free_BT = torch.ones_like(x_BT, dtype=torch.bool)
            t_B = (offset_W[begin : begin + batch] + r / passes) % 1.0
            if beside is not None:
                assert isinstance(noise, MaskedNoise)
                nats_B = loss.blockwise(noise, beside, x_BT, free_BT, rng, block_length, t_B)
            elif exact:
                nats_B = loss.autoregressive(noise, predict, x_BT, free_BT)
            elif estimator == "discrete":
                nats_B = loss.discrete(noise, predict, x_BT, free_BT, rng, steps, t_B)
            else:
                nats_B = LEVELS[estimator](noise, predict, x_BT, free_BT, rng, t_B)
            nats_RW[r, begin : begin + len(x_BT)] = nats_B.double().cpu() / length
            progress(len(x_BT))
    mean_W = nats_RW.mean(0)
    nats = mean_W.mean().item()
    # windows are independent given the text; stratified levels within one only lower the true error below this
    stderr = 0.0 if exact else (nats_RW.var(0) / passes).sum().sqrt().item() / windows
    spread = float(standard_error(mean_W))
    bits = nats * windows * length / characters / math.log(2)
    return Likelihood(nats, bits, stderr, spread, not exact, estimator, passes, windows * length, characters)
