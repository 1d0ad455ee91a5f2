"""The cost of drawing several masked tokens at once in random order: one curve prices every choice of step sizes.

With h(k) the mean cost of a masked token when k random others are known, a step that draws s positions, each from its own marginal,
costs sum_{l<s} [h(k) - h(k + l)] (2511.04647, 2510.25544).
Shapes: W windows of real text, T positions, K measured counts, B rows, I and J counts known, V vocabulary. Costs in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dlm import seeds
from dlm.errors import InputError
from dlm.noise.loss import Predict
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import time_when
from dlm.protocols import NoiseProcess

LEVEL_MASKS = 8
"""Masks that a level of the curve sees at least in each window and pass: levels with fewer get more patterns."""


@dataclass(frozen=True)
class CostCurve:
    """h at the counts known_K of each window: `entropy_WK` of the network's marginals, `text_WK` the cross-entropy on the text.

    The first prices the loss of a sampler under the network itself; the second prices its addition to the bound on this text.
    """

    known_K: Tensor
    entropy_WK: Tensor
    text_WK: Tensor
    length: int

    def every(self, values_WK: Tensor) -> Tensor:
        """At every count 0 .. T - 1: straight lines between those measured, nothing is smoothed. float64 (W, T)."""
        k_T = torch.arange(self.length)
        right_T = torch.searchsorted(self.known_K, k_T).clamp(min=min(1, len(self.known_K) - 1))
        left_T = (right_T - 1).clamp(min=0)
        share_T = (k_T - self.known_K[left_T]).double() / (self.known_K[right_T] - self.known_K[left_T]).clamp(min=1)
        return values_WK[:, left_T] + (values_WK[:, right_T] - values_WK[:, left_T]) * share_T


def log_probs(noise: NoiseProcess, predict: Predict, z_BT: Tensor) -> Tensor:
    """log p(x_i | z), at the time when so much is masked."""
    t_B = time_when(noise.schedule, (z_BT != noise.mask_id).double().mean(-1))
    return noise.log_probs(predict(z_BT, t_B), z_BT, t_B)


@torch.no_grad()
def entropy_curve(
    noise: MaskedNoise,
    predict: Predict,
    windows_WT: Tensor,
    *,
    levels: int = 33,
    passes: int = 1,
    seed: int = 0,
    batch: int = 32,
    progress: Callable[[int], None] = lambda _: None,
) -> CostCurve:
    """Measure h at about `levels` counts, spread evenly from 0 to T - 1. InputError for noise other than masks.

    A pattern counts all its masks (Rao-Blackwell); the patterns of a window are nested, one random order a pass, so that differences
    of h are steadier than h. progress is told the rows done, `curve_rows` in all.
    """
    if not isinstance(noise, MaskedNoise):
        raise InputError("the price of parallel decoding is counted in masks: it needs a diffusion model with masked noise")
    windows, length = windows_WT.shape
    rng = seeds.generator(seed, windows_WT.device)
    known_K, columns = _levels(length, levels)
    nats_2WK = torch.zeros(2, windows, len(known_K), dtype=torch.float64)
    for _ in range(passes):
        nested_WT = _rank(windows_WT, rng)
        for i, column in enumerate(columns):
            again = i > 0 and columns[i - 1] == column
            masked_WT = (_rank(windows_WT, rng) if again else nested_WT) >= int(known_K[column])
            for begin in range(0, windows, batch):
                x_BT, masked_BT = windows_WT[begin : begin + batch], masked_WT[begin : begin + batch]
                z_BT = torch.where(masked_BT, noise.mask_id, x_BT)
                logp_BTV = log_probs(noise, predict, z_BT)
                text_BT = noise.cross_entropy(logp_BTV, x_BT, z_BT)
                for k, cost_BT in enumerate((torch.special.entr(logp_BTV.exp()).sum(-1), text_BT)):
                    mean_B = (cost_BT.double() * masked_BT).sum(-1) / masked_BT.sum(-1)
                    nats_2WK[k, begin : begin + len(x_BT), column] += mean_B.cpu()
                progress(len(x_BT))
    nats_2WK /= passes * torch.tensor(columns).bincount()
    return CostCurve(known_K, nats_2WK[0], nats_2WK[1], length)


def curve_rows(windows: int, length: int, *, levels: int = 33, passes: int = 1) -> int:
    """Rows that `entropy_curve` puts through the network."""
    return windows * passes * len(_levels(length, levels)[1])


def _rank(like_WT: Tensor, rng: torch.Generator) -> Tensor:
    return torch.rand(like_WT.shape, generator=rng, device=rng.device).argsort(-1).argsort(-1)


def _levels(length: int, levels: int) -> tuple[Tensor, list[int]]:
    """The counts, and for every pattern of a pass the index of its count."""
    if levels < 2:
        raise InputError(f"a curve needs at least 2 levels, got {levels}")
    known = sorted({round(i * (length - 1) / (levels - 1)) for i in range(levels)})
    return torch.tensor(known), [i for i, k in enumerate(known) for _ in range(-(-LEVEL_MASKS // (length - k)))]


def price(h_T: Tensor, steps: Sequence[int]) -> Tensor:
    """Nats lost on a text whose positions are drawn in random order, so many in each step. Leading dimensions of h stay, so that
    one curve a window gives one price a window. InputError unless the sizes are positive and add up to T."""
    if min(steps, default=0) < 1 or sum(steps) != h_T.shape[-1]:
        raise InputError(f"step sizes are at least 1 and add up to the {h_T.shape[-1]} tokens of a text, these to {sum(steps)}")
    begin_N = torch.tensor([0, *accumulate(steps)][:-1], device=h_T.device)
    return (h_T[..., begin_N] * torch.tensor(steps, device=h_T.device)).sum(-1) - h_T.sum(-1)


def ancestral_price(h_T: Tensor, steps: int, *, draws: int = 64, seed: int = 0) -> Tensor:
    """Nats that a text loses when every position moves in one of `steps` equal steps by chance: the mean of `price` over such draws."""
    length, rng = h_T.shape[-1], seeds.generator(seed)
    step_NT = torch.randint(steps, (draws, length), generator=rng)
    counts_NS = torch.zeros(draws, steps, dtype=torch.long).scatter_add(1, step_NT, torch.ones_like(step_NT))
    return torch.stack([price(h_T, counts_S[counts_S > 0].tolist()) for counts_S in counts_NS]).mean(0)


def ancestral_prices(
    noise: MaskedNoise, predict: Predict, windows_WT: Tensor, *, progress: Callable[[int], None] = lambda _: None
) -> Callable[[int], float]:
    """`ancestral_price` of any number of steps by the entropies on these windows. progress is called with the rows of each call."""
    curve = entropy_curve(noise, predict, windows_WT, progress=progress)
    h_T = curve.every(curve.entropy_WK).mean(0)
    return lambda steps: float(ancestral_price(h_T, steps))


def equal_steps(length: int, count: int) -> list[int]:
    """Sizes of `count` steps that share the tokens evenly, larger ones first. InputError unless 1 <= count <= length."""
    if not 1 <= count <= length:
        raise InputError(f"{length} tokens take 1 to {length} steps, got {count}")
    return [length // count + (i < length % count) for i in range(count)]


def best_steps(h_T: Tensor, count: int) -> list[int]:
    """Sizes of the `count` steps of least price: dynamic programming over how many tokens are known, count x T^2."""
    length = len(h_T)
    equal_steps(length, count)  # the same bounds
    h_T = h_T.double().cpu()
    known_J, total_J = torch.arange(length + 1), torch.cat([torch.zeros(1, dtype=torch.float64), h_T.cumsum(0)])
    size_JI = known_J[:, None] - known_J[:-1]
    cost_JI = (size_JI * h_T - (total_J[:, None] - total_J[:-1])).masked_fill(size_JI < 1, torch.inf)
    best_J, came_from = cost_JI[:, 0], []
    for _ in range(count - 1):
        best_J, from_J = (cost_JI + best_J[:-1]).min(-1)
        came_from.append(from_J)
    ends = [length]
    for from_J in reversed(came_from):
        ends.append(int(from_J[ends[-1]]))
    return [b - a for a, b in pairwise([0, *reversed(ends)])]


def smooth(h_T: Tensor, degree: int = 4) -> Tensor:
    """The polynomial of least squares, to plan with: the best sizes follow the slope of h, where its noise is large."""
    length = len(h_T)
    x_T = torch.linspace(-1, 1, length, dtype=torch.float64)
    powers_TD = x_T[:, None] ** torch.arange(min(degree + 1, length))
    weights_D: Tensor = torch.linalg.lstsq(powers_TD, h_T.double().cpu()[:, None]).solution[:, 0]
    return powers_TD @ weights_D


def best_price(h_WT: Tensor, count: int) -> Tensor:
    """Price of the best steps in each window (W,), planned by the smooth mean of every other window and paid without smoothing: else
    noise in h would pass for a gain. InputError for a single window."""
    if len(h_WT) < 2:
        raise InputError("the best steps are chosen on one half of the windows and priced on the other: 2 windows at least")
    price_W = torch.empty(len(h_WT), dtype=torch.float64)
    for half in (0, 1):
        price_W[half::2] = price(h_WT[half::2], best_steps(smooth(h_WT[1 - half :: 2].mean(0)), count))
    return price_W
