"""Dropout on a CPU: how much is dropped, from which generator, and attention that drops weights."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F

from dlm.models import attention, elementwise
from dlm.models.dropout import Dropout, drawing_from, dropout


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 - 1e-6])
def test_the_share_and_the_mean(p: float, dtype: torch.dtype) -> None:
    x = torch.ones(1_000_001, dtype=dtype, requires_grad=True)  # no multiple of the draws of one word
    with drawing_from(seeded()):
        y = dropout(x, p)
    kept = (y != 0).sum().item()
    assert abs(kept - (1 - p) * x.numel()) < 5 * math.sqrt(p * (1 - p) * x.numel()) + 2**-16 * x.numel()
    assert len(y.unique()) <= 2
    dropped = min(round(p * 2**16), 2**16 - 1) / 2**16
    assert y.max() == 0 or y.max().item() == pytest.approx(1 / (1 - dropped), rel=0.004)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_draws_are_independent_in_place_and_time() -> None:
    with drawing_from(seeded()):
        first, second = (dropout(torch.ones(200_000), 0.5) > 0 for _ in range(2))
    for other in (first.roll(1), first.roll(2), first.roll(4), second):
        assert abs((first == other).float().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(200_000)


def test_masks_come_from_the_generator_of_the_thread() -> None:
    x, found = torch.ones(1000), {}

    def draw(seed: int) -> None:
        with drawing_from(seeded(seed)):
            found[seed] = dropout(x, 0.3)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, y in found.items():
        with drawing_from(seeded(seed)):
            assert torch.equal(dropout(x, 0.3), y)
    torch.manual_seed(5)
    outside = dropout(x, 0.3)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.3), outside)


def test_only_in_training() -> None:
    x, module = torch.ones(100), Dropout(0.5)
    assert not torch.equal(module(x), x)
    assert module.eval()(x) is x
    assert Dropout(0.0).train()(x) is x


@pytest.mark.parametrize("causal", [False, True])
def test_attention_drops_weights(causal: bool) -> None:
    """By the same masks: softmax, dropped, times the values."""
    q, k, v = (torch.randn(2, 3, 8, 4, generator=seeded(n)) for n in range(3))
    scores = q @ k.transpose(-1, -2) / 2
    if causal:
        scores = scores.masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf)
    with drawing_from(seeded()):
        weights = dropout(scores.softmax(-1), 0.4)
    with drawing_from(seeded()):
        found = attention.attend(q, k, v, None, causal, 0.4)
    torch.testing.assert_close(found, weights @ v)
    torch.testing.assert_close(attention.attend(q, k, v, None, causal), F.scaled_dot_product_attention(q, k, v, is_causal=causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_drops_weights_by_torch_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where dropout is torch's own, as under torch.compile."""
    monkeypatch.setattr(elementwise, "pay", lambda _: False)
    q, k, v = (torch.randn(2, 3, 8, 4, generator=seeded(n)).to(dtype).requires_grad_() for n in range(3))
    first, second = (attention.attend(q, k, v, None, False, 0.5) for _ in range(2))
    assert not torch.allclose(first, second)
