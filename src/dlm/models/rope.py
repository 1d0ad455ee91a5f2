"""Frequencies of rotary positions: plain ones (Su et al. 2104.09864), divided ones, those of Llama 3.1, and YaRN (Peng et al. 2309.00071).

K: dimensions of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LLAMA3, YARN = 4, 5  # numbers that describe each kind of scaling


def frequencies(
    head_dim: int,
    base: float,
    scaling: tuple[float, ...] = (),
    device: torch.device | None = None,
    factors: tuple[float, ...] = (),
) -> tuple[Tensor, float]:
    """Radians a position of each pair of dimensions, float32 (K / 2,), and a factor of cosines and sines.

    scaling: of Llama 3.1, (factor, low, high, former window): frequencies of fewer than `low` turns in the former window are divided by
    `factor`, those of more than `high` turns stay, and those between are interpolated.
    Of YaRN, (factor, fast, slow, former window, factor of cosines and sines): between the dimensions that turn `fast` and `slow` times
    in the former window, rounded outwards, the division by `factor` sets in linearly.
    factors: each frequency is divided by its own of K / 2, or all of them by one.
    """
    frequency_K = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    if factors:
        frequency_K = frequency_K / torch.tensor(factors, device=device)
    if len(scaling) == LLAMA3:
        factor, low, high, before = scaling
        kept_K = ((frequency_K * before / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequency_K * (kept_K + (1 - kept_K) / factor), 1.0
    if len(scaling) == YARN:
        factor, fast, slow, before, amplitude = scaling

        def dimension(turns: float) -> float:
            return head_dim * math.log(before / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), head_dim - 1)
        index_K = torch.arange(len(frequency_K), device=device, dtype=torch.float32)
        divided_K = ((index_K - first) / (last - first or 0.001)).clamp(0, 1)
        return frequency_K * (1 - divided_K + divided_K / factor), amplitude
    return frequency_K, 1.0
