"""Dropout whose masks on a CPU come from a generator of the thread. They take 16 random bits an element, and a third of torch's time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.models import elementwise

BITS = 16
_THREAD = threading.local()


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Masks that this thread draws on the CPU inside the block come from `generator`, not from torch's own, which all threads share."""
    _THREAD.generator = generator
    try:
        yield
    finally:
        _THREAD.generator = None


def dropout(x: Tensor, p: float) -> Tensor:
    """Each element is 0 with probability p, to a multiple of 2**-16 on a CPU, and divided by 1 - p otherwise."""
    if not elementwise.pay(x):
        return F.dropout(x, p)
    count, dropped = x.numel(), min(round(p * 2**BITS), 2**BITS - 1)
    words = torch.empty(-(-count * BITS // 64), dtype=torch.int64).random_(-(2**63), None, generator=getattr(_THREAD, "generator", None))
    kept = words.view(torch.int16)[:count].view(x.shape) >= dropped - 2 ** (BITS - 1)
    y: Tensor = x * kept.to(x.dtype).mul_(1 / (1 - dropped / 2**BITS))
    return y


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and self.p else x
