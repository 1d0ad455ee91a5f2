"""The learning rate, the average of the weights, and what decays."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.train.optimisers import EMA, Settings, adamw, learning_rate, make, orthogonal, set_learning_rate


def rates(steps: int, warmup: int = 10, decay_share: float = 0.25) -> list[float]:
    return [learning_rate(step, peak=2.0, steps=steps, warmup=warmup, decay_share=decay_share) for step in range(steps)]


def test_warm_up_stable_decay() -> None:
    curve = rates(100)
    assert curve[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert curve[10:76] == [2.0] * 66
    assert curve[75:] == pytest.approx([2.0 * (100 - step) / 25 for step in range(75, 100)])
    assert curve[-1] == pytest.approx(2.0 / 25)


def test_the_stable_part_does_not_depend_on_the_length() -> None:
    assert rates(100)[:75] == rates(400)[:75]


@pytest.mark.parametrize(("warmup", "decay_share"), [(0, 0.0), (0, 1.0), (5, 0.0), (30, 1.0)])
def test_rates_stay_between_zero_and_the_peak(warmup: int, decay_share: float) -> None:
    assert all(0 < rate <= 2.0 for rate in rates(20, warmup, decay_share))


def test_average_follows_its_formula() -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    ema = EMA(network, decay=0.5)
    expected = [p.detach().clone().double() for p in network.parameters()]
    for step in range(20):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p.detach().double() for e, p in zip(expected, network.parameters(), strict=True)]
    for average, value in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(average.double(), value, atol=1e-6, rtol=1e-6)


def test_swapped_shows_the_average_and_gives_the_weights_back() -> None:
    network = nn.Linear(3, 2)
    ema = EMA(network, decay=0.5)
    with torch.no_grad():
        network.weight.add_(1.0)
    own, average = network.weight.detach().clone(), ema.average[0].clone()
    with suppress(KeyError), ema.swapped():
        assert torch.equal(network.weight, average)
        raise KeyError
    assert torch.equal(network.weight, own)
    assert torch.equal(ema.average[0], average)


def test_matrices_decay_and_nothing_else() -> None:
    network = Transformer(TransformerConfig(vocab_size=7, layers=2, heads=2, width=8, window=8, qkv_bias=True, time_conditioning=True))
    optimizer = adamw(network, Settings(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: decays[id(p)] for name, p in network.named_parameters()}
    assert len(decays) == sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    assert all((decay == 0.1) == (name.endswith("weight") and "norm" not in name and "embed" not in name) for name, decay in named.items())
    assert named["head.weight"] == named["blocks.0.mlp.up.weight"] == 0.1
    assert named["embed.weight"] == named["blocks.0.attention.q.bias"] == named["norm.weight"] == 0.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_time_moves_no_faster_than_an_embedding(name: str) -> None:
    """After a step in which every weight goes the same way, the sum over the sinusoids has moved by no more than a token's vector."""
    network = Transformer(TransformerConfig(vocab_size=7, layers=2, heads=2, width=8, window=8, time_conditioning=True))
    before = network.embed.weight.detach().clone()
    optimizer = make(name, network, Settings(lr=1e-3))
    set_learning_rate(optimizer, 1e-3)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert network.time is not None
    with torch.no_grad():
        token, time = (float(x.abs().max()) for x in (network.embed.weight - before, network.time(torch.linspace(0, 1, 100))))
    assert token == pytest.approx(1e-3, rel=1e-3)
    assert 0.3 * token < time < 2.001 * token  # the weights and the bias


def test_a_tied_head_is_trained_once() -> None:
    network = Transformer(TransformerConfig(vocab_size=7, layers=1, heads=2, width=8, window=8, tied=True))
    optimizer = adamw(network, Settings(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1))
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == network.parameters_count()


def test_muon_steps_by_semi_orthogonal_matrices() -> None:
    for shape in ((3, 8, 20), (3, 20, 8), (1, 6, 6)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        sizes = torch.linalg.svdvals(orthogonal(matrices))
        assert 0.6 < sizes.min() <= sizes.max() < 1.3
        exact_u, _, exact_v = torch.linalg.svd(matrices, full_matrices=False)
        near = torch.nn.functional.cosine_similarity(orthogonal(matrices).flatten(1), (exact_u @ exact_v).flatten(1))
        assert near.min() > 0.97


def test_muon_takes_the_matrices_of_the_blocks_alone() -> None:
    network = Transformer(TransformerConfig(vocab_size=5, window=8, layers=1, heads=2, width=16, conv=3, mlp="swiglu"))
    named = {id(p): name for name, p in network.named_parameters()}
    groups = make("muon", network, Settings(lr=1e-3, weight_decay=0.1)).param_groups
    taken = {named[id(p)] for group in groups if group["muon"] for p in group["params"]}
    matrices = ["attention.q", "attention.k", "attention.v", "attention.out", "mlp.gate", "mlp.up", "mlp.down"]
    assert taken == {f"blocks.0.{name}.weight" for name in matrices}
    assert sum(len(group["params"]) for group in groups) == len(named)


def test_muon_follows_its_formula_and_adamw_beside_it() -> None:
    torch.manual_seed(0)
    network = Transformer(TransformerConfig(vocab_size=5, window=8, layers=1, heads=2, width=8))
    twin = Transformer(network.config)
    twin.load_state_dict(network.state_dict())
    settings = Settings(lr=1e-2, weight_decay=0.1)
    optimisers = {name: make(name, one, settings) for name, one in (("muon", network), ("adamw", twin))}
    set_learning_rate(optimisers["muon"], 1e-2)
    matrix, momentum = network.get_parameter("blocks.0.mlp.up.weight"), torch.zeros(32, 8)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(network.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        assert matrix.grad is not None
        gradient = matrix.grad.clone()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = orthogonal((0.05 * gradient + 0.95 * momentum)[None])[0]
        expected = matrix.detach() * (1 - 0.1 * 0.1 * 0.1) - 0.1 * 2 * update
        for optimiser in optimisers.values():
            optimiser.step()
        torch.testing.assert_close(matrix.detach(), expected, atol=1e-6, rtol=1e-5)
    for name in ("embed.weight", "head.weight", "norm.weight"):
        assert torch.equal(network.get_parameter(name), twin.get_parameter(name))
