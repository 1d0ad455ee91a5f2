"""The last block at chosen positions gives what it gives everywhere, in every pattern and over every cache, and computes no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.inference import prepare
from dlm.models import last_block
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer

VOCAB, INDEX_BC = 11, torch.tensor([[6, 2, 2], [0, 1, 5]])
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "block causal": {"attention": "block_causal", "block_length": 4},
    "short convolution": {"conv": 3},
    "grouped queries": {"kv_heads": 1, "mlp": "swiglu", "qk_norm": False},
    "one block": {"layers": 1},
}


def network(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(TransformerConfig(VOCAB, **({"window": 8, "layers": 2, "heads": 2, "width": 16} | changes)))
    with torch.no_grad():
        for weight in made.parameters():  # a fresh block gives nothing
            weight.add_(0.3 * torch.randn_like(weight))
    return made.double().eval().requires_grad_(False)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every product of an MLP's last layer in `last_block`: positions of a row."""
    found: list[int] = []
    inner = last_block._at

    def at(block: Any, *rest: Any) -> Tensor:
        handle = block.mlp.down.register_forward_pre_hook(lambda _, given: found.append(given[0].shape[1]))
        made = inner(block, *rest)
        handle.remove()
        return made

    monkeypatch.setattr(last_block, "_at", at)
    return found


def same(picked: Tensor, whole_BTV: Tensor) -> bool:
    return torch.allclose(picked, whole_BTV.gather(1, INDEX_BC[..., None].expand(-1, -1, VOCAB)), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_the_whole(kind: str, rows: list[int]) -> None:
    made = network(**KINDS[kind])
    z_BT, valid_BT = torch.randint(VOCAB, (2, 8)), torch.arange(8) < torch.tensor([[8], [6]])
    assert same(made(z_BT, index_BC=INDEX_BC), made(z_BT))
    assert same(made(z_BT, valid_BT=valid_BT, index_BC=INDEX_BC), made(z_BT, valid_BT=valid_BT))
    assert same(made(z_BT, pos_BQ=torch.arange(3, 11)[None], index_BC=INDEX_BC), made(z_BT, pos_BQ=torch.arange(3, 11)[None]))
    assert rows == [3, 3, 3]
    assert not torch.allclose(made(z_BT)[:, 0], made(z_BT.roll(1, 1))[:, 0])  # the network reads its text at all


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_is_filled_as_by_the_whole(kind: str, rows: list[int]) -> None:
    made = network(**KINDS[kind])
    z_BT, pos_BQ = torch.randint(VOCAB, (2, 8)), torch.arange(8).expand(2, -1)
    some, other = made.window_cache(2), made.window_cache(2)
    assert same(made(z_BT, pos_BQ=pos_BQ, cache=some, index_BC=INDEX_BC), made(z_BT, pos_BQ=pos_BQ, cache=other))
    again = [made(z_BT[:, 2:5], pos_BQ=pos_BQ[:, 2:5], cache=one) for one in (some, other)]
    assert torch.allclose(again[0], again[1], atol=1e-12)
    assert rows == [3]


@torch.no_grad()
def test_a_fused_network(rows: list[int]) -> None:
    made = network().float()
    z_BT = torch.randint(VOCAB, (2, 8))
    before = made(z_BT, index_BC=INDEX_BC)
    prepare(made)
    torch.testing.assert_close(made(z_BT, index_BC=INDEX_BC), before, atol=1e-5, rtol=1e-5)


def test_with_gradients_and_of_all_positions_every_block_computes_all(rows: list[int]) -> None:
    made, z_BT = network(), torch.randint(VOCAB, (2, 8))
    assert same(made(z_BT, index_BC=INDEX_BC), made(z_BT))
    with torch.no_grad():
        assert torch.equal(made(z_BT, index_BC=torch.arange(8).expand(2, -1)), made(z_BT))
    assert rows == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("some", [0.0, 0.3, 1.0])
def test_training_computes_the_last_block_where_logits_are_wanted(some: float, dropout: float) -> None:
    """Logits and gradients are those of the whole pass; dropout draws others after the last attention, so its logits are compared alone."""
    torch.manual_seed(0)
    network = Transformer(TransformerConfig(vocab_size=9, window=8, layers=2, heads=2, width=8, conv=3, dropout=dropout))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    network.train(dropout > 0)
    z_BT, at_BT = torch.randint(9, (3, 8)), torch.rand(3, 8) < some
    found = []
    for at_BQ in (None, at_BT):
        network.zero_grad()
        torch.manual_seed(1)
        logits_BTV = network(z_BT, at_BQ=at_BQ)
        assert logits_BTV.shape == (3, 8, 9)
        (logits_BTV.log_softmax(-1)[..., 0] * at_BT).sum().backward()
        found.append([logits_BTV[at_BT], *(p.grad for p in network.parameters())])
    if dropout:
        assert all(bool(part.isfinite().all()) for part in found[1] if part is not None)
        return
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, torch.zeros_like(one) if other is None else other, atol=1e-5, rtol=1e-4)
