"""Brute force on a tiny distribution: everything that a noise process or sampler claims can be enumerated here.

Shapes: S = V^T sequences of the data vocabulary V (the mask is id V), T positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Tiny:
    """A random distribution over all sequences of T tokens from V, with correlations between positions."""

    def __init__(self, vocab: int = 3, length: int = 3, seed: int = 0, concentration: float = 0.5) -> None:
        self.vocab, self.length, self.mask_id = vocab, length, vocab
        self.x_ST = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
        draws = np.random.default_rng(seed).dirichlet([concentration] * len(self.x_ST))
        self.p_S = torch.tensor(draws, dtype=torch.float64)

    def entropy(self) -> float:
        """Nats of a whole sequence."""
        return float(-(self.p_S * self.p_S.clamp(min=1e-300).log()).sum())

    def index(self, x_BT: Tensor) -> Tensor:
        """Position of each sequence in x_ST."""
        return (x_BT * self.vocab ** torch.arange(self.length - 1, -1, -1)).sum(-1)

    def patterns(self) -> Tensor:
        """Every set of masked positions, bool (2^T, T)."""
        return torch.tensor(list(itertools.product([False, True], repeat=self.length)))


class BayesDenoiser:
    """The exact posterior p(x_i | z) of a Tiny under masks, as log-probabilities for logits; V + 1 columns.

    Counts its calls, so that a sampler's claim about network calls can be checked. A shadow is the posterior with its own token hidden.
    """

    def __init__(self, tiny: Tiny) -> None:
        self.tiny, self.calls = tiny, 0

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, *, pattern: str = "", **_: object) -> Tensor:
        self.calls += 1
        z_BT = z_BQ[:, : self.tiny.length]
        text_BTV = self._posterior(z_BT)
        if pattern != "shadow":
            return text_BTV
        own_TT = torch.eye(self.tiny.length, dtype=torch.bool)
        hidden_BTV = [self._posterior(z_BT.masked_fill(own_T, self.tiny.mask_id))[:, i] for i, own_T in enumerate(own_TT)]
        return torch.cat([text_BTV, torch.stack(hidden_BTV, 1)], 1)

    def _posterior(self, z_BT: Tensor) -> Tensor:
        tiny = self.tiny
        fits_BS = ((z_BT[:, None] == tiny.x_ST) | (z_BT[:, None] == tiny.mask_id)).all(-1)
        weight_BS = fits_BS * tiny.p_S
        weight_BS = weight_BS / weight_BS.sum(-1, keepdim=True).clamp(min=1e-300)
        one_hot_STV = torch.nn.functional.one_hot(tiny.x_ST, tiny.vocab + 1).double()
        probs_BTV = torch.einsum("bs,stv->btv", weight_BS, one_hot_STV)
        return probs_BTV.clamp(min=1e-300).log()


def dense(noise: Any, t: float | Tensor) -> Tensor:
    """q(z_t | x), rows x, written out from the definition of each process in its docstring; (X, Z), or (B, X, Z) for times t_B."""
    vocab, name = noise.vocab_size - 1, type(noise).__name__
    one = torch.eye(vocab + 1, dtype=torch.float64)
    uniform, mask = torch.zeros_like(one), torch.zeros_like(one)
    uniform[:, :vocab], mask[:, vocab] = 1 / vocab, 1
    alpha = noise.schedule.alpha(torch.as_tensor(t, dtype=torch.float64))[..., None, None]
    law: Tensor
    if name in ("MaskedNoise", "ScoreNoise"):
        law = alpha * one + (1 - alpha) * mask
    elif name == "GenMD4Noise":
        share = (1 - alpha) ** torch.tensor(noise.weights, dtype=torch.float64)[:, None]
        law = (1 - share) * one + share * mask
        law[..., vocab, :] = mask[vocab]
    elif name == "UniformNoise":
        law = alpha * one + (1 - alpha) * uniform
    elif name == "GiddNoise":
        bump = 2**noise.gamma * noise.p_uniform / (1 - noise.p_uniform) * (alpha * (1 - alpha)) ** (noise.gamma / 2)
        law = (alpha * one + (1 - alpha) * mask + bump * uniform) / (1 + bump)
    elif name == "HybridNoise":
        part = ((alpha / (1 - alpha)).log() + math.log(noise.share / (1 - noise.share))).sigmoid()
        law = alpha * one + (1 - alpha) * (part * uniform + (1 - part) * mask)
    else:
        cluster = torch.tensor(noise.clusters)
        same = (cluster[:, None] == cluster).double()
        near, far = alpha, 1 - (1 - alpha) ** noise.lead
        prior = mask if noise.to == "mask" else uniform
        law = near * far * one + far * (1 - near) * same / same.sum(-1, keepdim=True) + (1 - far) * prior
    return law


def dense_move(noise: Any, s: float, t: float) -> Tensor:
    """q(z_t | z_s): the matrix M with q_s M = q_t."""
    move: Tensor = torch.linalg.solve(dense(noise, s), dense(noise, t))
    return move


class ReplacementBayes:
    """The exact posteriors of a Tiny under any noise whose kernels are dense matrices (B, X, Z) of the times; V + 1 columns.

    which: `leave-one-out` p(x_i | z without z_i), or `posterior` p(x_i | z).
    """

    def __init__(self, tiny: Tiny, kernels_of: Callable[[Tensor], Tensor], which: str = "leave-one-out") -> None:
        self.tiny, self.kernels_of, self.which, self.calls = tiny, kernels_of, which, 0

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **_: object) -> Tensor:
        assert t_B is not None
        self.calls += 1
        tiny = self.tiny
        z_BT, q_BXZ = z_BQ[:, : tiny.length], self.kernels_of(t_B)
        fits_BST = q_BXZ[torch.arange(len(z_BT))[:, None, None], tiny.x_ST, z_BT[:, None]]  # q(z_i | x_i) for each sequence
        if self.which == "posterior":
            weight_BST = fits_BST.prod(-1, keepdim=True).expand_as(fits_BST)
        else:
            others = [fits_BST[..., [j for j in range(tiny.length) if j != i]].prod(-1) for i in range(tiny.length)]
            weight_BST = torch.stack(others, -1)
        weight_BST = weight_BST * tiny.p_S[:, None]
        weight_BST = weight_BST / weight_BST.sum(1, keepdim=True).clamp(min=1e-300)
        one_hot_STV = torch.nn.functional.one_hot(tiny.x_ST, tiny.vocab + 1).double()
        return torch.einsum("bst,stv->btv", weight_BST, one_hot_STV).clamp(min=1e-300).log()


class VectorBayes:
    """The exact p(x_i | z without z_i) of a Tiny under Gaussian noise on vectors, given as evidence (B, T, V + 1): log-probabilities."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny, self.calls = tiny, 0

    def __call__(self, e_BTV: Tensor, t_B: Tensor | None = None) -> Tensor:
        self.calls += 1
        tiny = self.tiny
        at_BTS = e_BTV[:, : tiny.length].double().gather(-1, tiny.x_ST.T.expand(len(e_BTV), -1, -1))
        others_BTS = at_BTS.sum(1, keepdim=True) - at_BTS + tiny.p_S.log()
        one_hot_STV = torch.nn.functional.one_hot(tiny.x_ST, tiny.vocab + 1).double()
        return torch.einsum("bts,stv->btv", others_BTS.softmax(-1), one_hot_STV).clamp(min=1e-300).log()


class ClassBayes:
    """The exact p(x_i | z) of a Tiny under noise of classes, whatever the time: a class token leaves its words, a mask all of them."""

    def __init__(self, tiny: Tiny, noise: Any) -> None:
        self.tiny, self.ids = tiny, noise.vocab_size
        words = [[v for v in range(tiny.vocab) if noise.clusters[v] == c] for c in range(max(noise.clusters) + 1)]
        left = [*([v] for v in range(tiny.vocab)), list(range(tiny.vocab)), *words]
        self.left_ZV = torch.tensor([[v in one for v in range(self.ids)] for one in left])

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **_: object) -> Tensor:
        tiny, z_BT = self.tiny, z_BQ[:, : self.tiny.length]
        fits_BST = torch.stack([self.left_ZV[z_BT[:, i]][:, tiny.x_ST[:, i]] for i in range(tiny.length)], -1)
        weight_BS = fits_BST.all(-1) * tiny.p_S
        weight_BS = weight_BS / weight_BS.sum(-1, keepdim=True).clamp(min=1e-300)
        hot_STV = torch.nn.functional.one_hot(tiny.x_ST, self.ids).double()
        return torch.einsum("bs,stv->btv", weight_BS, hot_STV).clamp(min=1e-300).log()


class Noted:
    """A denoiser of any width whose guess depends on what it sees; remembers its calls. A shadow takes its own token for a mask."""

    def __init__(self, vocab: int, window: int) -> None:
        self.table_TV = 2 * torch.randn(window, vocab + 1, generator=torch.Generator().manual_seed(0))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, *, pattern: str = "", **_: object) -> Tensor:
        assert t_B is not None
        self.seen.append((z_BQ.clone(), t_B.clone()))
        columns_V = torch.arange(self.table_TV.shape[1])
        text_BT = z_BQ[:, : z_BQ.shape[1] // 2] if pattern == "shadow" else z_BQ
        shift_BT = text_BT.sum(-1, keepdim=True).expand_as(text_BT)
        places_Q = torch.arange(text_BT.shape[1])
        if pattern == "shadow":
            shift_BT, places_Q = torch.cat([shift_BT, shift_BT - text_BT + len(columns_V) - 1], 1), places_Q.repeat(2)
        return self.table_TV[places_Q[:, None], (columns_V - shift_BT[..., None]) % len(columns_V)]


def total_variation(samples_NT: Tensor, tiny: Tiny) -> float:
    """Distance between the histogram of samples and the distribution."""
    counts_S = torch.bincount(tiny.index(samples_NT), minlength=len(tiny.p_S)).double()
    return float((counts_S / counts_S.sum() - tiny.p_S).abs().sum() / 2)


def chi_square_p(samples_NT: Tensor, probs_S: Tensor, tiny: Tiny) -> float:
    """p-value of the samples under probs_S."""
    return chi_square_of_counts(torch.bincount(tiny.index(samples_NT), minlength=len(probs_S)), probs_S)


def chi_square_of_counts(counts: Tensor, probs: Tensor) -> float:
    """p-value of the counts under probs; cells with fewer than 5 expected are pooled."""
    counts, expected = counts.double(), probs * counts.sum()
    small = expected < 5
    if bool(small.any()):
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    if expected[-1] == 0:
        if counts[-1] > 0:
            return 0.0
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    half_dof = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_dof, statistic / 2))
