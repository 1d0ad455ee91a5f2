"""Drawing tokens: temperature, top-k, top-p, and an inverse CDF in float64.

Gumbel noise in float32 truncates the tails and lowers the entropy of the draws (Zheng et al. 2409.02908); one
float64 uniform a position through the inverse CDF does not, and needs V times fewer random numbers.
Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm import seeds
from dlm.errors import MAX_SETTING as MAX_SETTING
from dlm.errors import InputError, in_range
from dlm.protocols import RNG, Draws, SomeDraws

CHUNK_NUMBERS = 2**18
"""Probabilities that are worked on at once: intermediate results then stay in a cache of the processor."""


def generators(seed: int, rows: int) -> list[torch.Generator]:
    """Row i draws with seed + i: the same numbers alone or in any batch. InputError for a seed out of range."""
    first = seeds.check(seed)
    return [seeds.generator(seeds.after(first, row)) for row in range(rows)]


def uniform(rng: RNG, count: int) -> Tensor:
    """float64 (B, count), each row from its own generator."""
    return torch.stack([_own(g, count) for g in rng])


def _own(g: Draws, count: int) -> Tensor:
    """What lies past the end of a row that is shorter than its batch gets zeros, for nothing is drawn there."""
    if isinstance(g, SomeDraws):
        return g.pick(_own(g.own, g.width))
    if isinstance(g, torch.Generator):
        return torch.rand(count, generator=g, dtype=torch.float64)
    return F.pad(torch.rand(min(count, g.length), generator=g.generator, dtype=torch.float64), (0, max(0, count - g.length)))


def beside(u: Tensor, other: Tensor) -> Tensor:
    """Numbers drawn on the host, on the device of another tensor; a CUDA device does not make the host wait."""
    return u.to(other.device, non_blocking=other.is_cuda)


def categorical(logp_BTV: Tensor, u_BT: Tensor) -> Tensor:
    """Tokens by inverse CDF in float64, int64 (B, T). logp need not be normalised; -inf is never drawn."""
    cdf_BTV = logp_BTV.double().softmax(-1).cumsum(-1)
    index_BT = torch.searchsorted(cdf_BTV, (beside(u_BT, cdf_BTV) * cdf_BTV[..., -1])[..., None], right=True).squeeze(-1)
    # u times the last sum can round up to it; the last token of positive probability is meant then
    last_BT = logp_BTV.shape[-1] - 1 - (logp_BTV > -torch.inf).flip(-1).int().argmax(-1)
    return torch.minimum(index_BT, last_BT)


def race(logp_BTV: Tensor, u_BT: Tensor) -> Tensor:
    """Tokens by an exponential race, int64 (B, T): each token has a clock of rate p, the first to ring is drawn; u sets all the clocks.

    logp normalised. As exact as `categorical`, and coupled: two distributions p and q that are given the same u draw the same token with
    probability sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), at least (1 - TV) / (1 + TV) (Daliri et al. 2408.07978).
    """
    return scores(logp_BTV, u_BT).argmax(-1)


def scores(logp_BTV: Tensor, u_BT: Tensor) -> Tensor:
    """The scores of a race, the greatest wins: log p minus the log of the clock; log p alone where one token is certain.

    A distribution whose log-probabilities all differ from these by less than half the winner's lead draws the same token. Without the
    winner the next greatest wins. u_BT: (B, 1) for the same clocks at all positions of a row.
    """
    open_BT, u_BT = logp_BTV.amax(-1) < 0, beside(u_BT, logp_BTV)
    if logp_BTV.device.type != "cpu":  # all the clocks take less time than to ask which are needed
        score_BTV = logp_BTV.double()
        clocks_BTV = _clocks(u_BT.flatten(), logp_BTV.shape[-1]).log_().view(*u_BT.shape, -1)
        return torch.where(open_BT[..., None], score_BTV - clocks_BTV, score_BTV)
    if not bool(open_BT.any()):
        return logp_BTV
    if bool(open_BT.all()):
        return logp_BTV.double() - _clocks(u_BT.flatten(), logp_BTV.shape[-1]).log_().view(*u_BT.shape, -1)
    score_BTV = logp_BTV.to(torch.float64, copy=True)
    score_BTV[open_BT] -= _clocks(u_BT.expand(open_BT.shape)[open_BT], logp_BTV.shape[-1]).log_()
    return score_BTV


def _clocks(u_N: Tensor, size: int) -> Tensor:
    """Exponential numbers (N, size), float64: row n is the SplitMix64 stream (Steele et al. 2014) whose seed are the bits of u_n."""
    seed_N1 = _mix((u_N * 2.0**53).long())[:, None]
    bits_NV = _mix(seed_N1 + torch.arange(1, size + 1, device=u_N.device) * -0x61C8864680B583EB)
    return bits_NV.bitwise_right_shift_(11).bitwise_and_(2**53 - 1).double().add_(0.5).mul_(2.0**-53).log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, which wraps; a right shift copies the sign, so that the copied bits are masked away."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


NO_PROBABILITIES = "the model gives no probabilities (nan) where a token is due: its weights, its guidance or the constraint are broken"


def sound(logits: Tensor) -> Tensor:
    """Whether all of these logits or log-probabilities (..., V) make distributions, bool (): none has a NaN, +inf, or -inf alone.

    One pass over them and no copy: a greatest entry is NaN where one is NaN.
    """
    return logits.amax(-1).isfinite().all()


def check_sound(logits: Tensor) -> None:
    """InputError unless all of them are `sound`, before any token is drawn from them; every sampler asks it or `sound`."""
    if logits.numel() and not bool(sound(logits)):
        raise InputError(NO_PROBABILITIES)


def pick(x_BTV: Tensor, token_BT: Tensor) -> Tensor:
    """The entry of each position's token (B, T)."""
    return x_BTV.gather(-1, token_BT[..., None]).squeeze(-1)


def ranked(score_BT: Tensor, open_BT: Tensor, count_B: Tensor) -> Tensor:
    """bool (B, T): the count_B open positions of highest score, the first of equals."""
    order_BT = score_BT.masked_fill(~open_BT, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank_BT = order_BT.argsort(-1)
    return (rank_BT < count_B[:, None]) & open_BT


@dataclass(frozen=True)
class Draw:
    """How a token is drawn from a distribution: temperature, then top-k, then top-p, the nucleus.

    temperature 0 takes the most likely token; top_k 0 and top_p 1 keep all. InputError for settings out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        in_range(self.temperature, 0, MAX_SETTING, "the temperature")
        in_range(self.top_k, 0, MAX_SETTING, "top_k")
        in_range(self.top_p, 0, 1, "top_p", above=True)

    def shape(self, logp_BTV: Tensor) -> Tensor:
        """The log-probabilities after temperature and truncation, float64, normalised; temperature 0 leaves the likeliest token."""
        if self.temperature == 0:
            sure_BTV = torch.full_like(logp_BTV, -torch.inf, dtype=torch.float64)
            return sure_BTV.scatter_(-1, logp_BTV.argmax(-1, keepdim=True), 0.0)
        logp_BTV = logp_BTV.double()
        # the likeliest token is put at 0 first, so that it stays finite at any temperature
        logp_BTV = ((logp_BTV - logp_BTV.amax(-1, keepdim=True)) / self.temperature).log_softmax(-1)
        if self.top_k and self.top_k < logp_BTV.shape[-1]:
            kth = logp_BTV.topk(self.top_k, -1).values[..., -1:]
            logp_BTV = logp_BTV.masked_fill(logp_BTV < kth, -torch.inf)
        if self.top_p < 1:
            ordered, index = logp_BTV.sort(-1, descending=True)
            p = ordered.softmax(-1)  # of those that top-k left, as transformers measures it
            before = p.cumsum(-1) - p
            ordered = ordered.masked_fill(before >= self.top_p, -torch.inf)
            logp_BTV = torch.full_like(logp_BTV, -torch.inf).scatter(-1, index, ordered)
        return logp_BTV.log_softmax(-1) if self.top_k or self.top_p < 1 else logp_BTV

    def __call__(self, logp_BTV: Tensor, rng: RNG, by: Callable[[Tensor, Tensor], Tensor] = categorical) -> Tensor:
        """int64 (B, T). Uses one uniform a position from each row's generator, none at temperature 0.

        by: `race` where text is drawn from left to right: a draft token drawn with the same number is then likely to be that token.
        """
        if self.temperature == 0:
            return logp_BTV.argmax(-1)
        pieces = len(logp_BTV) if logp_BTV.device.type != "cpu" else max(1, CHUNK_NUMBERS // max(1, logp_BTV[0].numel()))
        parts = zip(*(torch.split(x, pieces) for x in (logp_BTV, uniform(rng, logp_BTV.shape[1]))), strict=True)
        return torch.cat([by(self.shape(logp_BTV), u_BT) for logp_BTV, u_BT in parts])
