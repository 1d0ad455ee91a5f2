"""Block diffusion: its bound on a tiny distribution, and the attention that makes one call of it.

Shapes: B rows, T positions, V vocabulary, S = V^T sequences.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.models import attention
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer, predict_beside
from dlm.noise import loss
from dlm.noise.masked import MaskedNoise
from oracle import BayesDenoiser, Tiny

TINY = Tiny(3, 4, seed=1)
NOISE = MaskedNoise(TINY.vocab + 1, TINY.mask_id)


def beside(z_BT: Tensor, x_BT: Tensor, block_length: int) -> Tensor:
    """The posterior of every block of z given the clean blocks before it, block by block."""
    parts = []
    for begin in range(0, TINY.length, block_length):
        state_BT = torch.full_like(z_BT, TINY.mask_id)
        state_BT[:, :begin] = x_BT[:, :begin]
        state_BT[:, begin : begin + block_length] = z_BT[:, begin : begin + block_length]
        parts.append(BayesDenoiser(TINY)(state_BT)[:, begin : begin + block_length])
    return torch.cat(parts, 1)


@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_the_bound_equals_the_entropy(block_length: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x_BT = TINY.x_ST[torch.multinomial(TINY.p_S, 40_000, replacement=True, generator=rng)]
    nats_B = loss.blockwise(NOISE, beside, x_BT, torch.ones_like(x_BT, dtype=torch.bool), rng, block_length)
    assert abs(float(nats_B.mean()) - TINY.entropy()) < 4 * float(nats_B.std()) / len(x_BT) ** 0.5


def test_blocks_of_one_are_exact() -> None:
    free_ST = torch.ones_like(TINY.x_ST, dtype=torch.bool)
    nats_S = loss.blockwise(NOISE, beside, TINY.x_ST, free_ST, torch.Generator().manual_seed(0), 1)
    assert torch.allclose(nats_S, -TINY.p_S.log())


def test_given_blocks_cost_nothing() -> None:
    free_ST = torch.ones_like(TINY.x_ST, dtype=torch.bool)
    free_ST[:, :2] = False
    nats_S = loss.blockwise(NOISE, beside, TINY.x_ST, free_ST, torch.Generator().manual_seed(0), 1)
    prefix_S = TINY.p_S.view(9, 9).sum(1).repeat_interleave(9)
    assert torch.allclose(nats_S, -(TINY.p_S / prefix_S).log())


@pytest.mark.parametrize("block_length", [0, 3, 5])
def test_blocks_must_divide(block_length: int) -> None:
    with pytest.raises(ValueError, match="divide"):
        loss.blockwise(NOISE, beside, TINY.x_ST, TINY.x_ST > -1, torch.Generator(), block_length)


def test_every_level_is_drawn_in_every_block() -> None:
    """Blocks of one row stand at different levels, and each block sees all of them over the rows."""
    seen: list[Tensor] = []

    def watch(z_BT: Tensor, x_BT: Tensor, block_length: int) -> Tensor:
        seen.append((z_BT.view(len(z_BT), -1, block_length) == 4).sum(-1))
        return torch.zeros(*z_BT.shape, 5)

    x_BT = torch.zeros(400, 32, dtype=torch.long)
    loss.blockwise(MaskedNoise(5, 4), watch, x_BT, x_BT == 0, torch.Generator().manual_seed(0), 8)
    for n in range(4):
        counts = torch.bincount(seen[0][:, n], minlength=9)
        assert counts[0] == 0
        assert (counts[1:] - 50).abs().max() <= 2
    assert (seen[0][:, 0] != seen[0][:, 1]).double().mean() > 0.5


def network(pattern: str, block_length: int = 0) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(TransformerConfig(9, 16, layers=2, heads=2, width=16, attention=pattern, block_length=block_length))
    made = made.double().eval().requires_grad_(False)
    for weight in made.parameters():
        weight.copy_(0.4 * torch.randn_like(weight))
    return made


@pytest.mark.parametrize("block_length", [1, 4, 16])
def test_one_call_beside_the_clean_text_equals_a_call_a_block(block_length: int) -> None:
    model, rng = network("block_causal", block_length), torch.Generator().manual_seed(0)
    x_BT, z_BT = (torch.randint(9, (2, 16), generator=rng) for _ in range(2))
    together = model(torch.cat([z_BT, x_BT], 1), pattern="clean")
    assert together.shape == (2, 16, 9)
    for begin in range(0, 16, block_length):
        state_BT = x_BT.clone()
        state_BT[:, begin : begin + block_length] = z_BT[:, begin : begin + block_length]
        alone = model(state_BT)[:, begin : begin + block_length]
        assert torch.allclose(together[:, begin : begin + block_length], alone, atol=1e-9)


def test_the_network_s_own_block_length_may_be_overruled() -> None:
    model, x_BT = network("block_causal", 4), torch.randint(9, (2, 32), generator=torch.Generator().manual_seed(0))
    same = [network("block_causal", n)(x_BT, pattern="clean") for n in (2, 8)]
    assert all(torch.equal(model(x_BT, pattern="clean", block_length=n), own) for n, own in zip((2, 8), same, strict=True))
    assert not torch.allclose(same[0], same[1])


def gradients(model: Transformer, z_BT: Tensor, x_BT: Tensor, block_length: int, at_BT: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the gradients of a sum over some of them."""
    want_BT = z_BT == 8
    logits = predict_beside(model, z_BT, x_BT, block_length, at_BT)
    weights = list(model.parameters())
    return logits.detach()[want_BT], list(torch.autograd.grad(logits.double().sin()[want_BT].sum(), weights))


@pytest.mark.parametrize("conv", [0, 5])
@pytest.mark.parametrize("block_length", [1, 4, 64, 128, 192])
def test_runs_of_queries_read_as_by_a_mask(block_length: int, conv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the last block works on the masks alone where no other logits are wanted."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(9, 192, layers=2, heads=2, width=8, attention="block_causal", block_length=4, conv=conv)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.4 * torch.randn_like(weight))
    x_BT, z_BT = (torch.randint(9, (2, 192), generator=torch.Generator().manual_seed(n)) for n in range(2))
    runs = [gradients(model, z_BT, x_BT, block_length, at_BT) for at_BT in (None, z_BT == 8)]
    monkeypatch.setattr(Transformer, "_tiles", lambda *_: None)
    expected, of_weights = gradients(model, z_BT, x_BT, block_length, None)
    for logits, found in runs:
        torch.testing.assert_close(logits, expected)
        for one, other in zip(found, of_weights, strict=True):
            torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-6)


def test_runs_skip_keys_that_none_of_them_reads() -> None:
    tiles = attention.tiles_beside_clean(192, 16, torch.device("cpu"))
    assert [tile.keys for tile in tiles.runs] == [(0, 3), (1, 3, 4), (2, 3, 4, 5), (3,), (3, 4), (3, 4, 5)]
    assert attention.tiles_beside_clean(192, 64, torch.device("cpu")).runs[1] == ((1, 3), None)


def test_beside_clean_by_hand() -> None:
    read = attention.beside_clean(torch.arange(4)[None], 2)[0].int().tolist()
    assert read == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_follows_another_block_length() -> None:
    sizes: dict[str, Any] = {"layers": 2, "heads": 2, "width": 32, "attention": "block_causal", "block_length": 8}
    torch.manual_seed(0)
    models = [Transformer(TransformerConfig(9, 128, backend=backend, **sizes)).eval().requires_grad_(False) for backend in ("sdpa", "flex")]
    for weight in models[0].parameters():
        weight.copy_(0.2 * torch.randn_like(weight))
    models[1].load_state_dict(models[0].state_dict())
    z_BT = torch.randint(9, (1, 128), generator=torch.Generator().manual_seed(0))
    for length in (0, 2, 32):
        sdpa, flex = (model(z_BT, block_length=length) for model in models)
        assert torch.allclose(sdpa, flex, atol=1e-4)
    assert not torch.allclose(models[1](z_BT, block_length=2), models[1](z_BT), atol=1e-2)
