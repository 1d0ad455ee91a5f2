"""Seeds: one range everywhere, all 64 bits of which count.

torch's generator on the CPU (a Mersenne Twister) reads the lower 32 bits of a seed and no more. A seed below 2**32 is handed over as it is;
any other is mixed into 32 bits first. Importing this loads no torch.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, SupportsIndex

from dlm.errors import InputError

if TYPE_CHECKING:
    import torch

LOWEST, HIGHEST = -(2**63), 2**63 - 1
_WORD = 2**64 - 1


def check(seed: SupportsIndex) -> int:
    """The seed itself. InputError for one outside of 64 bits with a sign, and for what is no whole number."""
    try:
        number = operator.index(seed)
    except TypeError:
        raise InputError(f"a seed is a whole number, got {seed!r}") from None
    if not LOWEST <= number <= HIGHEST:
        shown = str(number) if number.bit_length() < 200 else f"one of {number.bit_length()} bits"
        raise InputError(f"a seed lies in -2**63 .. 2**63 - 1, got {shown}")
    return number


def after(seed: int, rows: int) -> int:
    """The seed so many rows later; the lowest follows the highest."""
    return (seed + rows - LOWEST) % 2**64 + LOWEST


def folded(seed: int) -> int:
    """The number in 0 .. 2**32 - 1 that stands for a seed; InputError as of `check`."""
    x = check(seed)
    if 0 <= x < 2**32:
        return x
    x &= _WORD
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finaliser of SplitMix64 (Steele et al. 2014)
        x = (x ^ x >> shift) * factor & _WORD
    return (x ^ x >> 31) & 2**32 - 1


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on this device; InputError as of `check`."""
    import torch

    return torch.Generator(device).manual_seed(folded(seed))
