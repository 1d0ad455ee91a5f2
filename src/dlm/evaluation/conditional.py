"""log p(continuation | context) of masked diffusion models: the number that multiple-choice benchmarks compare.

Only the continuation is masked, k of its n tokens with k uniform on 1..n, and the cross-entropy of the masked tokens has weight n/k: the
estimator of LLaDA (Nie et al. 2502.09992), an upper bound on -log p. Block diffusion takes it block by block, each given the text before
it (BD3-LM, 2503.09573); in blocks of one token it is exact.
Shapes: B rows, T positions, S samples, N tokens of a continuation, M masked ones of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise

MASKED, BLOCKWISE = "conditional any-order", "conditional block-wise"


class Predict(Protocol):
    """The network as the estimator calls it."""

    def __call__(self, z_BT: Tensor, x_BT: Tensor, *, want_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
        """Logits (B, T, V), needed at want_BT alone. x_BT: the clean text, which a later block of block diffusion reads."""


@dataclass(frozen=True)
class Pair:
    """Token ids of a context, which may be empty, and of the continuation that is scored."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)

    def within(self, window: int) -> Pair:
        """The pair without the beginning of its context, at most `window` tokens. InputError for a longer continuation."""
        if len(self.continuation) > window:
            raise InputError(f"a continuation of {len(self.continuation)} tokens is longer than the window of {window}")
        most = window - len(self.continuation)
        return Pair(self.context[len(self.context) - most :] if len(self.context) > most else self.context, self.continuation)

    def seed(self, seed: int, *more: int) -> int:
        """A seed of its own, so that it gets the same numbers in any batch and in a resumed run."""
        digest = hashlib.sha256(repr((seed, more, self.context, self.continuation)).encode()).digest()
        return int.from_bytes(digest[:7])


@dataclass(frozen=True)
class Score:
    """logp: nats, at most the true value for a bound; stderr: its Monte-Carlo error, 0 where every mask pattern was read.
    is_greedy: whether revealing the surest token first, one a forward pass, writes the continuation."""

    logp: float
    stderr: float
    is_greedy: bool


@dataclass(frozen=True)
class Masks:
    """Patterns of one continuation. masked_SN: bool; weight_SN: of each masked token, 0 elsewhere; exact: whether these are all."""

    masked_SN: Tensor
    weight_SN: Tensor
    exact: bool

    @classmethod
    def draw(cls, sizes: Sequence[int], samples: int, rng: torch.Generator) -> Masks:
        """For blocks of these sizes, each with a level of its own: every pattern once where that takes at most `samples`."""
        if exact := max(2**n - 1 for n in sizes) <= samples:
            parts = [_every(n) for n in sizes]
            most = max(len(masked) for masked, _ in parts)
            parts = [tuple(torch.cat([x, x.new_zeros(most - len(x), x.shape[1])]) for x in part) for part in parts]  # type: ignore[misc]
        else:
            parts = [_drawn(n, samples, rng) for n in sizes]
        return cls(torch.cat([masked for masked, _ in parts], 1), torch.cat([weight for _, weight in parts], 1), exact)


def _every(n: int) -> tuple[Tensor, Tensor]:
    """All patterns of n tokens but the empty one, with weight 1 / (k C(n, k)) at the masked tokens."""
    masked_SN = torch.tensor(list(itertools.product([False, True], repeat=n))[1:])
    weights = torch.tensor([0.0, *(1 / (k * math.comb(n, k)) for k in range(1, n + 1))], dtype=torch.float64)
    return masked_SN, weights[masked_SN.sum(-1)][:, None] * masked_SN


def _drawn(n: int, samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random patterns whose counts are spread evenly over 1..n, with weight n / k / S."""
    level_S = (torch.rand(1, generator=rng, dtype=torch.float64) + torch.arange(samples) / samples) % 1.0
    count_S1 = ((level_S * n).floor().clamp(max=n - 1) + 1)[:, None]
    masked_SN = torch.rand(samples, n, generator=rng).argsort(-1).argsort(-1) < count_S1
    return masked_SN, n / count_S1 / samples * masked_SN


@dataclass(frozen=True)
class Rows:
    """Texts side by side, padded with masks. want_BT: the continuation; valid_BT: None where the padding is read as noise."""

    x_BT: Tensor
    want_BT: Tensor
    valid_BT: Tensor | None


@dataclass(frozen=True)
class Estimator:
    """window: positions that the network reads at most; fills_window: whether it reads masks up to there, as it did in training.

    block_length: of block diffusion, else 0; samples: mask patterns a continuation; batch: rows of a forward pass.
    """

    noise: MaskedNoise
    predict: Predict
    window: int
    fills_window: bool
    block_length: int = 0
    samples: int = 128
    seed: int = 0
    batch: int = 1
    device: torch.device | str = "cpu"

    @torch.no_grad()
    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """(index, score) of every pair, long ones first. InputError for a continuation longer than the window."""
        if self.samples < 2:
            raise InputError("the error of a Monte-Carlo estimate needs at least 2 samples")
        pairs = [pair.within(self.window) for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i]))
        for begin in range(0, len(order), self.batch):
            some = order[begin : begin + self.batch]
            greedy = self._greedy([pairs[i] for i in some])
            masks = [self._masks(pairs[i]) for i in some]
            for part in self._runs(masks):
                nats = self._nats([pairs[i] for i in some[part]], masks[part])
                for i, mask, nats_S, is_greedy in zip(some[part], masks[part], nats, greedy[part], strict=True):
                    stderr = 0.0 if mask.exact else float(nats_S.std() * math.sqrt(len(nats_S)))
                    yield i, Score(-float(nats_S.sum()), stderr, is_greedy)

    def _runs(self, masks: Sequence[Masks]) -> Iterator[slice]:
        """Pairs that fill a forward pass together, so that an answer comes as soon as it can."""
        begin, rows = 0, 0
        for end, mask in enumerate(masks, 1):
            rows += len(mask.masked_SN)
            if rows >= self.batch or end == len(masks):
                yield slice(begin, end)
                begin, rows = end, 0

    def _masks(self, pair: Pair) -> Masks:
        """The mask patterns of a pair, drawn from its own seed."""
        length, begin, end = self.block_length or len(pair), len(pair.context), len(pair)
        cuts = [begin, *range((begin // length + 1) * length, end, length), end]
        rng = torch.Generator().manual_seed(pair.seed(self.seed))
        return Masks.draw([b - a for a, b in itertools.pairwise(cuts)], self.samples, rng)

    def _nats(self, pairs: Sequence[Pair], masks: Sequence[Masks]) -> list[Tensor]:
        """For each pair the terms (S,) whose sum is its nats."""
        rows = [(p, s) for p, mask in enumerate(masks) for s in range(len(mask.masked_SN))]
        found = [torch.zeros(len(mask.masked_SN), dtype=torch.float64) for mask in masks]
        for begin in range(0, len(rows), self.batch):
            some = rows[begin : begin + self.batch]
            text = self._stack([pairs[p] for p, _ in some])
            masked_BT, weight_BT = torch.zeros_like(text.want_BT), torch.zeros(text.want_BT.shape, dtype=torch.float64)
            for b, (p, s) in enumerate(some):
                part = slice(len(pairs[p].context), len(pairs[p]))
                masked_BT[b, part] = masks[p].masked_SN[s].to(self.device)
                weight_BT[b, part] = masks[p].weight_SN[s]
            logits_MV, z_BT = self._read(text, masked_BT)
            nll_1M = self.noise.nll(logits_MV[None], text.x_BT[masked_BT][None], z_BT[masked_BT][None])
            nats_BT = torch.zeros_like(weight_BT).masked_scatter(masked_BT.cpu(), nll_1M.double().cpu()) * weight_BT
            for (p, s), nats in zip(some, nats_BT.sum(-1), strict=True):
                found[p][s] = nats
        return found

    def _greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether each continuation is written by the surest token first; a row ends at its first other token."""
        text = self._stack(pairs)
        open_BT, right_B = text.want_BT.clone(), torch.ones(len(pairs), dtype=torch.bool, device=self.device)
        while bool((alive_B := right_B & open_BT.any(-1)).any()):
            due_BT = self._first_block(open_BT) & alive_B[:, None]
            logits_MV, z_BT = self._read(text, open_BT, due_BT)
            sure_1M, token_1M = self.noise.log_probs(logits_MV[None], z_BT[due_BT][None]).max(-1)
            sure_BT = torch.full(open_BT.shape, -torch.inf, dtype=sure_1M.dtype, device=self.device).masked_scatter(due_BT, sure_1M)
            token_BT = torch.zeros_like(text.x_BT).masked_scatter(due_BT, token_1M)
            at_B1 = sure_BT.argmax(-1, keepdim=True)
            equal_B = (token_BT.gather(1, at_B1) == text.x_BT.gather(1, at_B1)).squeeze(1)
            right_B &= equal_B | ~alive_B
            open_BT = open_BT.scatter(1, at_B1, open_BT.gather(1, at_B1) & ~alive_B[:, None])
        return [bool(right) for right in right_B.tolist()]

    def _first_block(self, open_BT: Tensor) -> Tensor:
        """The open positions that may be revealed next."""
        if not self.block_length:
            return open_BT
        block_T = torch.arange(open_BT.shape[1], device=open_BT.device) // self.block_length
        return open_BT & (block_T == block_T[open_BT.int().argmax(-1)][:, None])

    def _read(self, text: Rows, masked_BT: Tensor, due_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (M, V) at due_BT, by default at every masked token of the continuation; and the noisy text z_BT."""
        z_BT = text.x_BT.masked_fill(masked_BT, self.noise.mask_id)
        due_BT = masked_BT if due_BT is None else due_BT
        return self.predict(z_BT, text.x_BT, want_BT=due_BT, valid_BT=text.valid_BT)[due_BT].float(), z_BT

    def _stack(self, pairs: Sequence[Pair]) -> Rows:
        width = self.window if self.fills_window else max(len(pair) for pair in pairs)
        if self.block_length:
            width = math.ceil(max(len(pair) for pair in pairs) / self.block_length) * self.block_length
        x_BT = torch.full((len(pairs), width), self.noise.mask_id)
        length_B1 = torch.tensor([[len(pair)] for pair in pairs])
        begin_B1 = torch.tensor([[len(pair.context)] for pair in pairs])
        for b, pair in enumerate(pairs):
            x_BT[b, : len(pair)] = torch.tensor([*pair.context, *pair.continuation])
        valid_BT = torch.arange(width) < length_B1
        padded = not (self.fills_window or self.block_length or bool(valid_BT.all()))
        want_BT = valid_BT & (torch.arange(width) >= begin_B1)
        return Rows(x_BT.to(self.device), want_BT.to(self.device), valid_BT.to(self.device) if padded else None)
