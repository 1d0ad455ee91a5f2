"""Estimators of one number: the bound on -log p(x), in nats per row.

`continuous`, `any_order` and `discrete` have the same expectation for a masked model without time input (discrete
from above); they differ in variance. Each returns (B,) nats summed over the free positions of a row, so that the
caller divides by its own unit: tokens, characters. A visible position that is not free is given, not predicted.
Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.noise.classes import ClassNoise
from dlm.noise.masked import MaskedNoise
from dlm.noise.replacement import ReplacementNoise
from dlm.noise.schedule import is_whole
from dlm.noise.score import ScoreNoise
from dlm.protocols import BoundedProcess, NoiseProcess, NoiseSchedule

Predict = Callable[[Tensor, Tensor], Tensor]
"""(z_BT, t_B) -> logits_BTV."""
PredictBeside = Callable[[Tensor, Tensor, int], Tensor]
"""(z_BT, x_BT, block_length) -> logits_BTV, every block of z beside the clean blocks before it."""


def draw_levels(batch: int, rng: torch.Generator) -> Tensor:
    """One uniform draw for the whole batch, t_i = (u + i/B) mod 1 (Kingma et al. 2107.00630, appendix I.1). float64 (B,)."""
    u = torch.rand(1, generator=rng, device=rng.device, dtype=torch.float64)
    return (u + torch.arange(batch, device=rng.device, dtype=torch.float64) / batch) % 1.0


def bell(u_B: Tensor) -> Tensor:
    """Beta(2, 2) levels of uniform draws, by the inverse of its distribution 3 t^2 - 2 t^3."""
    return 0.5 - ((1 - 2 * u_B).clamp(-1, 1).asin() / 3).sin()


def count_masks(levels_B: Tensor, free_B: Tensor) -> Tensor:
    """Of n free positions 1..n masks at levels from 0 to 1, int64 (B,)."""
    return (levels_B * free_B).floor().long().clamp(max=free_B - 1) + 1


def bell_density(t_B: Tensor) -> Tensor:
    """Of Beta(2, 2) (B,)."""
    return 6 * t_B * (1 - t_B)


def early(u_B: Tensor) -> tuple[Tensor, Tensor]:
    """Times t = u^2 of uniform draws, and what each counts for, 2u (B,).

    The integrand of a bound grows as 1/t in a share t of the rows, so that uniform times would give it infinite variance and a sample
    error that is too small.
    """
    return u_B.square().clamp(1e-12, 1 - 1e-6), 2 * u_B


def best(schedule: NoiseSchedule, *, masked: bool, reads_time: bool = False) -> str:
    """The estimator here with the least variance that applies, by its name."""
    if not is_whole(schedule) or (masked and reads_time):
        return "continuous"
    return "any_order" if masked else "counted"


def noised(noise: BoundedProcess, x_BT: Tensor, free_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
    """z at t with the positions that are not free as they are: tokens (B, T), or of noise on vectors their evidence (B, T, V)."""
    z = noise.corrupt(x_BT, t_B, rng)
    if (certain := getattr(noise, "certain", None)) is not None:
        return torch.where(free_BT[..., None], z, certain(x_BT, z))
    return torch.where(free_BT, z, x_BT)


class Parts(NamedTuple):
    """The three parts of a bound, nats (B,) each."""

    prior_B: Tensor
    diffusion_B: Tensor
    reconstruction_B: Tensor

    @property
    def bound_B(self) -> Tensor:
        return self.diffusion_B + (self.prior_B + self.reconstruction_B)


def _ends(noise: BoundedProcess, predict: Predict, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prior and reconstruction term (B,)."""
    zero_B = torch.zeros(len(x_BT), device=x_BT.device, dtype=torch.float64)
    if is_whole(noise.schedule) and not getattr(noise, "ends", False):
        return zero_B, zero_B
    prior_B = (noise.prior_cost(x_BT) * free_BT).sum(-1)
    z_BT = noised(noise, x_BT, free_BT, zero_B, rng)
    nll_BT = noise.cross_entropy(noise.log_probs(predict(z_BT, zero_B), z_BT, zero_B), x_BT, z_BT, zero_B)
    return prior_B, (nll_BT * free_BT).sum(-1)


def end_terms(noise: BoundedProcess, predict: Predict, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator) -> Tensor:
    """Prior plus reconstruction term (B,), both 0 for noise on tokens with a schedule that runs from exactly 1 to exactly 0."""
    prior_B, reconstruction_B = _ends(noise, predict, x_BT, free_BT, rng)
    return prior_B + reconstruction_B


def continuous(
    noise: BoundedProcess, predict: Predict, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, u_B: Tensor | None = None
) -> Tensor:
    """The continuous-time bound with one time a row (MD4 eq. 5 for masks). (B,) nats. u_B: uniform draws.

    Times are those of `early`, unless the noise has a method `times` of its own; a method `control` gives a part of mean 0 to leave out.
    """
    return parts(noise, predict, x_BT, free_BT, rng, u_B).bound_B


def parts(noise: BoundedProcess, predict: Predict, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, u_B: Tensor | None = None) -> Parts:
    """The parts of `continuous`."""
    u_B = draw_levels(len(x_BT), rng) if u_B is None else u_B
    t_B, weight_B = getattr(noise, "times", early)(u_B)
    z_BT = noised(noise, x_BT, free_BT, t_B, rng)
    logp_BTV = noise.log_probs(predict(z_BT, t_B), z_BT, t_B)
    nats_BT = noise.nelbo(logp_BTV, x_BT, z_BT, t_B)
    if (control := getattr(noise, "control", None)) is not None:
        nats_BT = nats_BT - control(x_BT, z_BT, t_B)
    prior_B, reconstruction_B = _ends(noise, predict, x_BT, free_BT, rng)
    return Parts(prior_B, weight_B * (nats_BT * free_BT).sum(-1), reconstruction_B)


def denoising(
    noise: BoundedProcess, predict: Predict, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, u_B: Tensor | None = None
) -> Tensor:
    """-log p(x_i | z_t) summed over the free positions at one time a row. (B,) nats.

    No bound, but the same guess is best for both, and its gradient does not vanish where the guess is sure and wrong.
    """
    t_B = draw_levels(len(x_BT), rng) if u_B is None else u_B
    z_BT = noised(noise, x_BT, free_BT, t_B, rng)
    nll_BT = noise.cross_entropy(noise.log_probs(predict(z_BT, t_B), z_BT, t_B), x_BT, z_BT, t_B)
    return (nll_BT * free_BT).sum(-1)


def equal_masks(
    noise: MaskedNoise, predict: Predict, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, u_B: Tensor | None = None
) -> Tensor:
    """`any_order` with equal weights, for a network that reads t: shares of masks from Beta(2, 2), every masked token alike. (B,) nats."""
    t_B = noise.schedule.inverse(1 - bell(draw_levels(len(x_BT), rng) if u_B is None else u_B))
    return 2 * denoising(noise, predict, x_BT, free_BT, rng, t_B)  # the mean share is a half


def score_entropy(
    noise: ScoreNoise, predict: Predict, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, u_B: Tensor | None = None
) -> Tensor:
    """As `continuous`, with SEDD's own integrand, whose predictions are not normalised: never less, in expectation. (B,) nats."""
    u_B = draw_levels(len(x_BT), rng) if u_B is None else u_B
    t_B, weight_B = early(u_B)
    z_BT = noised(noise, x_BT, free_BT, t_B, rng)
    diffusion_B = weight_B * (noise.score_entropy(predict(z_BT, t_B), x_BT, z_BT, t_B) * free_BT).sum(-1)
    return diffusion_B + end_terms(noise, predict, x_BT, free_BT, rng)


def discrete(
    noise: NoiseProcess, predict: Predict, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, steps: int, t_B: Tensor | None = None
) -> Tensor:
    """The bound of a sampler with `steps` equal steps in t; one step a row, times their number. (B,) nats; decreases as steps grow."""
    t_B = draw_levels(len(x_BT), rng) if t_B is None else t_B
    step_B = (t_B * steps).floor()
    s_B, t_B = step_B / steps, (step_B + 1) / steps
    z_BT = noised(noise, x_BT, free_BT, t_B, rng)
    logp_BTV = noise.log_probs(predict(z_BT, t_B), z_BT, t_B)
    diffusion_B = steps * (noise.nelbo_step(logp_BTV, x_BT, z_BT, t_B, s_B) * free_BT).sum(-1)
    return diffusion_B + end_terms(noise, predict, x_BT, free_BT, rng)


def any_order(
    noise: MaskedNoise,
    predict: Predict,
    x_BT: Tensor,
    free_BT: Tensor,
    rng: torch.Generator,
    t_B: Tensor | None = None,
    teacher: Predict | None = None,
    equal: bool = False,
) -> Tensor:
    """The continuous bound with the time integrated out: k masks, k uniform on 1..n, weight n/k. (B,) nats.

    Given a mask pattern with k of n positions masked, the time is Beta distributed and E[1/t] P(k) = 1/k: the same
    expectation as `continuous` for any schedule from 1 to 0, with less variance (Rao-Blackwell), and equal to the mean
    over all orders of the autoregressive loss. Only for a network that does not read t. Of ordered noise the orders are drawn, and the
    masks weighted, by its race.
    teacher: a network whose predictions replace the text: the nats are then KL(teacher || network), the path KL of their chains.
    equal: levels from Beta(2, 2) and every masked token weighted alike. That is no bound, but its gradient has half the variance.
    """
    levels_B = draw_levels(len(x_BT), rng) if t_B is None else t_B
    levels_B = bell(levels_B) if equal else levels_B
    free_B = free_BT.sum(-1)
    count_B = count_masks(levels_B, free_B)
    z_BT = noise.corrupt_count(x_BT, count_B, free_BT, rng)
    t_B = count_B / free_B.clamp(min=1)
    logits_BTV = predict(z_BT, t_B)
    nll_BT = noise.nll(logits_BTV, x_BT, z_BT) if teacher is None else noise.kl(teacher(z_BT, t_B), logits_BTV, z_BT)
    sum_B, left_B = noise.next_cost(nll_BT, z_BT, count_B.clamp(min=1))
    if equal:
        sum_B, left_B = nll_BT.sum(-1), (free_B + 1) / 2  # the mean count of Beta(2, 2) levels
    return sum_B * free_B / left_B  # a row with nothing to predict costs nothing


def two_clocks_parts(
    noise: ClassNoise,
    predict: Predict,
    x_BT: Tensor,
    free_BT: Tensor,
    rng: torch.Generator,
    u_B: Tensor | None = None,
    equal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The two parts of the continuous bound of `ClassNoise`, classes and words given their classes, (B,) nats each.

    As `any_order`, the time is integrated out: of the 2n events of n free positions k are hidden, k uniform on 1..2n. equal: as there.
    """
    u_B = draw_levels(len(x_BT), rng) if u_B is None else u_B
    events_B = 2 * free_BT.sum(-1)
    count_B = count_masks(bell(u_B) if equal else u_B, events_B)
    z_BT, early_B = noise.corrupt_count(x_BT, count_B, free_BT, rng)
    nll = noise.nll(predict(z_BT, count_B / events_B.clamp(min=1)), x_BT, z_BT)
    class_B, word_B, weight_B = noise.next_costs(nll, z_BT, count_B, early_B)
    weight_B = noise.mean_weight * events_B / 2 if equal else weight_B
    scale_B = events_B / weight_B.clamp(min=1)  # a row with nothing to predict costs nothing
    return scale_B * class_B, scale_B * word_B


def two_clocks(
    noise: ClassNoise,
    predict: Predict,
    x_BT: Tensor,
    free_BT: Tensor,
    rng: torch.Generator,
    u_B: Tensor | None = None,
    equal: bool = False,
) -> Tensor:
    """The sum of `two_clocks_parts`: the bound on the text. (B,) nats."""
    class_B, word_B = two_clocks_parts(noise, predict, x_BT, free_BT, rng, u_B, equal)
    return class_B + word_B


def blockwise(
    noise: MaskedNoise,
    predict: PredictBeside,
    x_BT: Tensor,
    free_BT: Tensor,
    rng: torch.Generator,
    block_length: int,
    t_B: Tensor | None = None,
    equal: bool = False,
) -> Tensor:
    """The bound of block diffusion: blocks from left to right, each by masked diffusion given the text before it. (B,) nats.

    `any_order` on every block at once (BD3-LM, Arriola et al. 2503.09573, eq. 7, with the time integrated out). Blocks of 1 make it
    the exact autoregressive likelihood, one block the bound of plain diffusion. ValueError unless blocks divide the row. equal: as there.
    """
    (rows, length), levels_B = x_BT.shape, draw_levels(len(x_BT), rng) if t_B is None else t_B
    if block_length < 1 or length % block_length:
        raise ValueError(f"blocks of {block_length} do not divide {length} tokens")
    count = length // block_length
    # each block is at a level of its own; steps of the golden ratio spread them evenly over any run of blocks
    spread_N = torch.arange(count, device=x_BT.device, dtype=levels_B.dtype) * (math.sqrt(5) - 1) / 2
    levels_M = ((levels_B[:, None] + spread_N) % 1.0).flatten()

    def predict_blocks(z_ML: Tensor, _t_M: Tensor) -> Tensor:
        return predict(z_ML.view(rows, length), x_BT, block_length).view(rows * count, block_length, -1)

    x_ML, free_ML = x_BT.reshape(-1, block_length), free_BT.reshape(-1, block_length)
    return any_order(noise, predict_blocks, x_ML, free_ML, rng, levels_M, equal=equal).view(rows, count).sum(-1)


def counted(
    noise: ReplacementNoise, predict: Predict, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, u_B: Tensor | None = None
) -> Tensor:
    """The continuous bound of replacement noise with the number of noised positions drawn first, uniform on 0..n. (B,) nats.

    The counterpart of `any_order`: the weight 1/t of a noised position becomes about n/k, without the variance of k at a given t.
    For a schedule from 1 to 0.
    """
    u_B = draw_levels(len(x_BT), rng) if u_B is None else u_B
    free_B = free_BT.sum(-1)
    count_B = torch.minimum((u_B * (free_B + 1)).floor().long(), free_B)
    z_BT, t_B, weight_B = noise.corrupt_count(x_BT, count_B, free_BT, rng)
    logp_BTV = noise.log_probs(predict(z_BT, t_B), z_BT, t_B)
    return weight_B * (noise.nelbo(logp_BTV, x_BT, z_BT, t_B) * free_BT).sum(-1)


def autoregressive(noise: BoundedProcess, predict: Predict, x_BT: Tensor, free_BT: Tensor) -> Tensor:
    """Exact -log p(x) of a causal network that reads MASK as the start token and x shifted right. (B,) nats."""
    start_B1 = torch.full_like(x_BT[:, :1], noise.mask_id)
    logits_BTV = predict(torch.cat([start_B1, x_BT[:, :-1]], 1), torch.zeros(len(x_BT), device=x_BT.device))
    logits_BTV = logits_BTV.clone()
    logits_BTV[..., noise.mask_id] = -torch.inf
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), x_BT, reduction="none")
    return (nll_BT * free_BT).sum(-1)
