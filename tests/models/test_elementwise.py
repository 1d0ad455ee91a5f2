"""Values and gradients against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.models import elementwise
from dlm.models.block import rotary, rotate
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def angles(length: int, size: int, amplitude: float = 1.3) -> tuple[Tensor, Tensor]:
    """cos and sin (1, 1, Q, K), those of YaRN times an amplitude."""
    cos, sin = rotary(torch.arange(length)[None], size, 100.0)
    return cos.double() * amplitude, sin.double() * amplitude


def turned(x_BQHK: Tensor, weight_K: Tensor | None) -> Tensor:
    cos, sin = angles(x_BQHK.shape[1], x_BQHK.shape[3])
    return elementwise.turned(x_BQHK, weight_K, 1e-3, cos.transpose(1, 2), sin.transpose(1, 2))


def turned_by_torch(x_BQHK: Tensor, weight_K: Tensor | None) -> Tensor:
    x_BQHK = x_BQHK if weight_K is None else F.rms_norm(x_BQHK, x_BQHK.shape[-1:], weight_K, 1e-3)
    return rotate(x_BQHK.transpose(1, 2), *angles(x_BQHK.shape[1], x_BQHK.shape[3])).transpose(1, 2)


def convolved_by_torch(x_BQD: Tensor, weight_JD: Tensor, steps: range) -> Tensor:
    padded_BQD = F.pad(x_BQD, (0, 0, max(0, -steps[0]), max(0, steps[-1])))
    begin = max(0, -steps[0])
    shifted = [padded_BQD[:, begin + step : begin + step + x_BQD.shape[1]] for step in steps]
    return x_BQD + torch.stack([part * weight_D for part, weight_D in zip(shifted, weight_JD, strict=True)]).sum(0)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "norm": (
        lambda x, w: elementwise.rms_norm(x, w, 1e-3),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-3),
        (drawn(2, 3, 6), drawn(6)),
    ),
    "norm of a view": (
        lambda x, w: elementwise.rms_norm(x.transpose(1, 2), w, 1e-3),
        lambda x, w: F.rms_norm(x.transpose(1, 2), w.shape, w, 1e-3),
        (drawn(2, 3, 4, 6), drawn(6)),
    ),
    "turned": (turned, turned_by_torch, (drawn(2, 5, 3, 4), drawn(4))),
    "turned without a norm": (lambda x: turned(x, None), lambda x: turned_by_torch(x, None), (drawn(2, 5, 3, 4),)),
    "squared relu": (lambda x: elementwise.squared_relu(x.clone()), lambda x: F.relu(x).square(), (drawn(3, 7),)),
    **{
        f"taps {steps}, {length} positions": (
            lambda x, w, steps=steps: elementwise.convolved(x, w, steps),
            lambda x, w, steps=steps: convolved_by_torch(x, w, steps),
            (drawn(2, length, 3), drawn(len(steps), 3)),
        )
        for steps in (range(-2, 3), range(-3, 1), range(1))
        for length in (1, 2, 6)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_torch(case: str) -> None:
    """And of finite differences."""
    ours, torchs, inputs = CASES[case]
    want, got = torchs(*inputs), ours(*inputs)
    assert torch.allclose(got, want)
    with torch.no_grad():  # by a path of its own
        assert torch.allclose(ours(*inputs), want)
    g = torch.randn_like(want)
    for one, other in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
        assert torch.allclose(one, other)
    assert torch.autograd.gradcheck(ours, inputs)


SETTINGS: list[dict[str, Any]] = [
    {"conv": 5},
    {"conv": 4, "attention": "causal", "mlp": "swiglu", "kv_heads": 2, "head_dim": 6},
    {"qk_norm": False},
    {"rotary_dim": 2},
]


def network_and_text(settings: dict[str, Any], seed: int = 0) -> tuple[Transformer, Tensor]:
    torch.manual_seed(seed)
    network = Transformer(TransformerConfig(**{"vocab_size": 7, "window": 12, "layers": 2, "heads": 4, "width": 16} | settings))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return network, torch.randint(7, (3, 12))


def computed(network: Transformer, z_BT: Tensor, *, pays: bool = True) -> dict[str, Tensor]:
    """Logits without and with gradients, and the gradient of each parameter. pays: by our functions, else by torch's."""
    with pytest.MonkeyPatch.context() as patch:
        if not pays:
            patch.setattr(elementwise, "pay", lambda _x: False)
        network.zero_grad()
        with torch.no_grad():
            without_BTV = network(z_BT)
        logits_BTV = network(z_BT)
        logits_BTV.float().log_softmax(-1)[..., 0].sum().backward()
    grads = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {"without gradients": without_BTV, "with gradients": logits_BTV.detach()} | grads


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
def test_a_network_has_the_same_gradients_by_either_path(settings: dict[str, Any], dtype: torch.dtype, close: float) -> None:
    network, z_BT = network_and_text(settings)
    network.to(dtype)
    ours, torchs = computed(network, z_BT), computed(network, z_BT, pays=False)
    for name, want in torchs.items():
        assert float((ours[name] - want).abs().max()) <= close * max(1.0, float(want.abs().max())), name


def farther_than_torch(settings: dict[str, Any], seeds: int = 16, factor: float = 1.3) -> list[str]:
    """The tensors that our functions in bfloat16 leave farther from float64 than `factor` times torch's, by the geometric mean over seeds.

    Rounding is about 1 % of a tensor in either path, and the largest ratio without an error is 1.18.
    """
    ratios: dict[str, list[Tensor]] = {}
    for seed in range(seeds):
        network, z_BT = network_and_text({"width": 32, **settings}, seed)
        network.to(torch.bfloat16)
        ours, torchs = computed(network, z_BT), computed(network, z_BT, pays=False)
        for name, exact in computed(network.double(), z_BT, pays=False).items():
            ratios.setdefault(name, []).append((ours[name] - exact).norm() / (torchs[name] - exact).norm())
    return [name for name, ratio in ratios.items() if torch.stack(ratio).log().mean().exp() > factor]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bfloat16_is_as_near_to_float64_as_torchs(settings: dict[str, Any]) -> None:
    assert not farther_than_torch(settings)


@pytest.mark.parametrize("function", ["_Norm", "_Turned", "_SquaredReLU", "_Convolved"])
def test_a_gradient_of_a_wrong_scale_is_found_in_bfloat16(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 % too large in the first gradient of one function."""
    right = getattr(elementwise, function).backward

    def wrong(ctx: Any, g: Tensor) -> Any:
        found = right(ctx, g)
        return (found[0] * 1.03, *found[1:]) if isinstance(found, tuple) else found * 1.03

    monkeypatch.setattr(getattr(elementwise, function), "backward", staticmethod(wrong))
    assert farther_than_torch({"conv": 5})


@pytest.mark.parametrize("size", [4, 32, 96, 192, 576])
def test_rows_do_not_depend_on_those_beside_them(size: int) -> None:
    """Bit for bit, without gradients: a text is written alone as it is written in a batch."""
    x_BQHK, weight_K = torch.randn(3, 5, 2, size), torch.randn(size)
    cos, sin = (part.transpose(1, 2) for part in rotary(torch.arange(5)[None], size, 100.0))
    with torch.no_grad():
        many = elementwise.rms_norm(x_BQHK, weight_K, 1e-6), elementwise.turned(x_BQHK, weight_K, 1e-6, cos, sin)
        one_1Q1K = x_BQHK[1:2, :, 1:2].clone()
        alone = elementwise.rms_norm(one_1Q1K, weight_K, 1e-6), elementwise.turned(one_1Q1K, weight_K, 1e-6, cos, sin)
    for whole, part in zip(many, alone, strict=True):
        assert torch.equal(whole[1:2, :, 1:2], part)
