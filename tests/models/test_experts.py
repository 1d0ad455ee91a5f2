"""A mixture of experts equals its definition computed token by token; every switch of the router shows; partial rotary positions.

Shapes: N tokens, D width, E experts, S experts of a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.inference import prepare
from dlm.models.block import Rotary, rotate
from dlm.models.config import ExpertsConfig, TransformerConfig
from dlm.models.experts import Experts
from dlm.models.transformer import Transformer

WIDTH, COUNT = 16, 12
EVERYTHING: dict[str, Any] = {
    "score": "sigmoid",
    "normalised": True,
    "scaling": 2.5,
    "correction": True,
    "groups": 4,
    "groups_per_token": 2,
    "shared_width": 8,
}


def config(**changes: Any) -> TransformerConfig:
    experts = ExpertsConfig(**{"count": COUNT, "per_token": 3, "width": 8} | changes)
    return TransformerConfig(20, 16, 2, 2, 2, WIDTH, mlp="swiglu", mlp_width=24, experts=experts)


def layer(seed: int = 0, **changes: Any) -> Experts:
    made, rng = Experts(config(**changes)), torch.Generator().manual_seed(seed)
    for p in made.state_dict().values():
        p.copy_(torch.randn(p.shape, generator=rng) * (0.2 if p.ndim == 1 else 0.5))
    return made.requires_grad_(False)


def by_hand(made: Experts, x_ND: Tensor) -> Tensor:
    """Token by token, in float64 and with sorted lists."""
    e, state, rows = made.router.experts, {name: p.double() for name, p in made.state_dict().items()}, []

    def mlp(name: str, x_D: Tensor) -> Tensor:
        gate, up, down = (state[f"{name}.{part}.weight"] for part in ("gate", "up", "down"))
        y_D: Tensor = down @ (torch.nn.functional.silu(gate @ x_D) * (up @ x_D))
        return y_D

    for x_D in x_ND.double():
        logits_E = state["router.weight"] @ x_D
        score_E = (logits_E.sigmoid() if e.score == "sigmoid" else logits_E.softmax(-1)).tolist()
        rank_E = [s + b for s, b in zip(score_E, state.get("router.correction", torch.zeros(e.count)).tolist(), strict=True)]
        size = e.count // e.groups
        worth = [sum(sorted(rank_E[g * size : (g + 1) * size])[-2:]) for g in range(e.groups)]
        open_groups = sorted(range(e.groups), key=lambda g: -worth[g])[: e.groups_per_token]
        chosen = sorted((i for i in range(e.count) if i // size in open_groups), key=lambda i: -rank_E[i])[: e.per_token]
        total = sum(score_E[i] for i in chosen) if e.normalised else 1.0
        y_D = sum((score_E[i] / total * e.scaling * mlp(f"experts.{i}", x_D) for i in chosen), torch.zeros(WIDTH).double())
        rows.append(y_D + (mlp("shared", x_D) if e.shared_width else 0))
    return torch.stack(rows)


@pytest.mark.parametrize("changes", [{}, {"scaling": 3.0}, {"correction": True}, {"normalised": True}, EVERYTHING], ids=str)
def test_experts_equal_their_definition_token_by_token(changes: dict[str, Any]) -> None:
    made = layer(**changes)
    torch.testing.assert_close(made(tokens()).double(), by_hand(made, tokens()), atol=1e-5, rtol=1e-5)


def test_the_weight_of_a_single_expert_stays_as_it_is() -> None:
    """As in the reference of LLaDA2: the router would learn nothing from a weight that is always 1."""
    made = layer(per_token=1, normalised=True, scaling=3.0)
    torch.testing.assert_close(made(tokens()).double(), by_hand(layer(per_token=1, scaling=3.0), tokens()), atol=1e-5, rtol=1e-5)


def tokens(count: int = 40) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(7))


WRONG: dict[str, dict[str, Any]] = {
    "score": {"score": "softmax"},
    "normalisation": {"normalised": False},
    "scaling": {"scaling": 1.0},
    "groups": {"groups": 1, "groups_per_token": 1},
    "groups of a token": {"groups_per_token": 3},
    "experts of a token": {"per_token": 4},
}


@pytest.mark.parametrize("switch", WRONG)
def test_every_switch_of_the_router_shows(switch: str) -> None:
    other = layer(**EVERYTHING | WRONG[switch])
    other.load_state_dict(layer(**EVERYTHING).state_dict())
    assert (other(tokens()) - layer(**EVERYTHING)(tokens())).abs().max() > 0.1


@pytest.mark.parametrize("name", ["router.correction", "shared.down.weight", "router.weight", "experts.11.up.weight"])
def test_every_weight_shows(name: str) -> None:
    other = layer(**EVERYTHING)
    other.state_dict()[name].mul_(-1)
    assert (other(tokens()) - layer(**EVERYTHING)(tokens())).abs().max() > 0.1


def test_a_token_does_not_depend_on_the_others() -> None:
    made, x_ND = layer(**EVERYTHING), tokens()
    alone = torch.cat([made(x_D[None]) for x_D in x_ND])
    torch.testing.assert_close(made(x_ND.view(4, 10, WIDTH)).flatten(0, 1), alone, atol=1e-5, rtol=1e-5)


def network(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(config(**EVERYTHING | changes)).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.requires_grad_(False)


def test_first_layers_are_dense_and_counted() -> None:
    made = network(first_layer=1)
    assert made.get_parameter("blocks.0.mlp.up.weight").shape == (24, WIDTH)
    assert len([name for name, _ in made.named_parameters() if name.startswith("blocks.1.mlp.experts")]) == 3 * COUNT
    dense, e = made.config.with_(experts=None).forward_flops()[0], made.config.experts
    assert e is not None
    active = 2 * WIDTH * (3 * (e.per_token * e.width + e.shared_width) + e.count - 3 * 24)
    assert made.config.forward_flops()[0] == dense + active
    assert TransformerConfig(**made.config.to_dict()) == made.config


def test_every_expert_learns_from_the_tokens_that_chose_it() -> None:
    made = network(groups=1, groups_per_token=1).requires_grad_(True)
    z_BT = torch.arange(64).view(4, 16) % 20
    made(z_BT).square().mean().backward()
    missing = {name.split(".mlp.")[1].rsplit(".", 2)[0] for name, p in made.named_parameters() if p.grad is None}
    assert {name.split(".")[0] for name in missing} <= {"experts"}
    assert made.get_parameter("blocks.0.mlp.router.weight").grad is not None
    assert len(missing) < COUNT


def test_fused_experts_are_the_same() -> None:
    plain, made, z_BT = network(), prepare(network()), torch.arange(32).view(2, 16) % 20
    torch.testing.assert_close(made(z_BT), plain(z_BT), atol=1e-4, rtol=1e-4)
    assert made.get_submodule("blocks.1.mlp.experts.3.fused_in") is not None


@pytest.mark.parametrize(("bits", "near"), [(8, 0.05), (4, 0.3)])
def test_quantized_experts_are_near(bits: int, near: float) -> None:
    plain, made, z_BT = network(), prepare(network(), bits=bits), torch.arange(32).view(2, 16) % 20
    assert made.quantized
    router = "blocks.0.mlp.router.weight"
    assert torch.equal(made.get_parameter(router), plain.get_parameter(router))
    assert [p for name, p in made.named_parameters() if ".experts." in name] == []
    assert 0 < (made(z_BT) - plain(z_BT)).std() < near * plain(z_BT).std()


def test_partial_rotary_positions() -> None:
    shape = config().with_(head_dim=8, rotary_dim=4)
    x_BHQK, pos_BQ = torch.randn(1, 2, 5, 8), torch.arange(5)[None]
    found = rotate(x_BHQK, *Rotary(shape)(pos_BQ))
    whole = rotate(x_BHQK[..., :4], *Rotary(shape.with_(head_dim=4, rotary_dim=0))(pos_BQ))
    assert torch.equal(found[..., 4:], x_BHQK[..., 4:])
    assert torch.equal(found[..., :4], whole)
    assert not torch.allclose(found, rotate(x_BHQK, *Rotary(shape.with_(rotary_dim=0))(pos_BQ)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "tanh"}, "known: softmax, sigmoid"),
        ({"groups": 5}, "in 5 groups cannot be"),
        ({"per_token": 7, "groups": 4, "groups_per_token": 2}, "chosen among 6 in 2 groups"),
        ({"groups_per_token": 2}, "in 2 groups"),
    ],
)
def test_experts_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        config().with_(rotary_dim=3)
