"""Quality of generated text: bits under a judge, always beside its diversity, since a judge prefers dull text.

Shapes: N samples, T tokens each.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dlm.errors import InputError
from dlm.evaluation.statistics import Mean
from dlm.noise import loss
from dlm.protocols import NoiseProcess


@torch.no_grad()
def judge_bits_each(noise: NoiseProcess, predict: loss.Predict, samples_NT: Tensor, *, batch: int = 32, given: int = 0) -> Tensor:
    """Bits per token of every sample under an autoregressive judge with the same vocabulary (exact likelihood), the first `given`
    tokens not counted. (N,)"""
    counted_T = torch.arange(samples_NT.shape[1], device=samples_NT.device) >= given
    parts = [loss.autoregressive(noise, predict, x, counted_T.expand_as(x)) for x in torch.split(samples_NT, batch)]
    return torch.cat(parts) / (samples_NT.shape[1] - given) / math.log(2)


def judge_bits(noise: NoiseProcess, predict: loss.Predict, samples_NT: Tensor, *, batch: int = 32) -> Mean:
    """Mean of `judge_bits_each`."""
    return Mean.of(judge_bits_each(noise, predict, samples_NT, batch=batch))


def entropy_each(samples_NT: Tensor) -> Tensor:
    """Bits of the token frequencies within every sample (N,): of one length, or they cannot be compared."""
    counts_NV = torch.nn.functional.one_hot(samples_NT).sum(1).double()
    bits_N: Tensor = torch.special.entr(counts_NV / samples_NT.shape[1]).sum(-1) / math.log(2)
    return bits_N


def distinct_each(samples_NT: Tensor, n: int) -> Tensor:
    """Share of n-grams within every sample that are different from each other (N,)."""
    return torch.tensor([distinct(row[None], n) for row in samples_NT], dtype=torch.float64)


def figures(noise: NoiseProcess, predict: loss.Predict, *, given: int = 0) -> Callable[[Tensor], dict[str, Tensor]]:
    """Bits, entropy and distinct_4 of every text (N,) after its first `given` tokens, under an autoregressive judge of the same
    vocabulary."""

    def measure(samples_NT: Tensor) -> dict[str, Tensor]:
        bits_N, new_NT = judge_bits_each(noise, predict, samples_NT, given=given), samples_NT[:, given:]
        return {"bits": bits_N, "entropy": entropy_each(new_NT), "distinct_4": distinct_each(new_NT, 4)}

    return measure


def unigram_entropy(samples_NT: Tensor) -> float:
    """Bits of the pooled token frequencies."""
    counts = torch.bincount(samples_NT.flatten()).double()
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log2()).sum().item()


def distinct(samples_NT: Tensor, n: int) -> float:
    """Share of n-grams, pooled over the samples, that are different from each other."""
    grams = Counter(tuple(g) for row in samples_NT.unfold(1, n, 1).tolist() for g in row)
    return len(grams) / sum(grams.values())


def mauve(p_ND: Tensor, q_ND: Tensor, *, seed: int = 25) -> float:
    """MAUVE of two sets of texts from features of each (Pillutla et al. 2102.01454), with smoothed clusters (mauve-star): 1 where they
    lie alike. It depends on how many there are: compare equal numbers, and real text with real text for the floor. (eval extra)"""
    try:
        from mauve import compute_mauve
    except ModuleNotFoundError:
        raise InputError("MAUVE needs the eval extra: pip install 'dlm[eval]'") from None
    features = {"p_features": p_ND.double().cpu().numpy(), "q_features": q_ND.double().cpu().numpy()}
    return float(compute_mauve(**features, seed=seed, verbose=False).mauve_star)


@torch.no_grad()
def hidden_features(network: nn.Module, samples_NT: Tensor, mask_id: int, *, batch: int = 32) -> Tensor:
    """Mean over positions of the input of the output head, of an autoregressive network of the same vocabulary (N, D)."""
    found: list[Tensor] = []
    hook = network.get_submodule("head").register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].mean(1)))
    try:
        for x_BT in torch.split(samples_NT, batch):
            network(torch.cat([torch.full_like(x_BT[:, :1], mask_id), x_BT[:, :-1]], 1))
    finally:
        hook.remove()
    return torch.cat(found)


def known_words(texts: list[str], vocabulary: set[str]) -> float:
    """Share of the words (runs of letters and apostrophes, inner ones only: the first and last may be cut) found in `vocabulary`."""
    words = [w.lower() for text in texts for w in re.findall(r"[A-Za-z']+", text)[1:-1]]
    return sum(w in vocabulary for w in words) / max(1, len(words))


def vocabulary(text: str) -> set[str]:
    """The words of a text, as `known_words` counts them."""
    return {w.lower() for w in re.findall(r"[A-Za-z']+", text)}
