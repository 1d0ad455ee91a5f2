"""What generated text is worth: bits under a judge, always beside its diversity, since dull text pleases a judge.

Shapes: N samples, T tokens each.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.noise import loss
from dlm.protocols import NoiseProcess


@dataclass(frozen=True)
class Mean:
    """A mean over samples and its standard error."""

    value: float
    stderr: float

    @classmethod
    def of(cls, values_N: Tensor) -> Mean:
        error = values_N.double().std().item() / math.sqrt(len(values_N)) if len(values_N) > 1 else math.nan
        return cls(values_N.double().mean().item(), error)


@torch.no_grad()
def judge_bits_each(noise: NoiseProcess, predict: loss.Predict, samples_NT: Tensor, *, batch: int = 32) -> Tensor:
    """Bits per token of every sample under an autoregressive judge with the same vocabulary (exact likelihood). (N,)"""
    parts = [loss.autoregressive(noise, predict, x, torch.ones_like(x, dtype=torch.bool)) for x in torch.split(samples_NT, batch)]
    return torch.cat(parts) / samples_NT.shape[1] / math.log(2)


def judge_bits(noise: NoiseProcess, predict: loss.Predict, samples_NT: Tensor, *, batch: int = 32) -> Mean:
    """Mean of `judge_bits_each`."""
    return Mean.of(judge_bits_each(noise, predict, samples_NT, batch=batch))


def unigram_entropy(samples_NT: Tensor) -> float:
    """Bits of the pooled token frequencies."""
    counts = torch.bincount(samples_NT.flatten()).double()
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log2()).sum().item()


def distinct(samples_NT: Tensor, n: int) -> float:
    """Share of n-grams, pooled over the samples, that are different from each other."""
    grams = Counter(tuple(g) for row in samples_NT.unfold(1, n, 1).tolist() for g in row)
    return len(grams) / sum(grams.values())


def known_words(texts: list[str], vocabulary: set[str]) -> float:
    """Share of the words (runs of letters and apostrophes, inner ones only: the first and last may be cut) found in `vocabulary`."""
    words = [w.lower() for text in texts for w in re.findall(r"[A-Za-z']+", text)[1:-1]]
    return sum(w in vocabulary for w in words) / max(1, len(words))


def vocabulary(text: str) -> set[str]:
    """The words of a text, as `known_words` counts them."""
    return {w.lower() for w in re.findall(r"[A-Za-z']+", text)}
