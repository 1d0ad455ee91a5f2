"""Diffusion models in bfloat16, with quantized weights and compiled: how near they stay, in every pattern and with every cache.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import make_model
from dlm.errors import InputError
from dlm.inference import prepare
from dlm.inference.compiled import CompiledBlocks
from dlm.inference.fused import FusedHead
from dlm.language_model import LanguageModel, load, official
from dlm.models import elementwise
from dlm.models.block import Head
from dlm.sampling.diffusion.cache_policies import POLICIES
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = 60  # ids below the control tokens of every model here
ADALN = ("mdlm", "bd3lm", "sedd", "duo", "gidd")
DTYPES = ("bfloat16", "int8", "int4")
NATS = {"bfloat16": 1e-3, "int8": 2e-3, "int4": 0.1}  # of mean KL from float32 for each token
SAME = {"bfloat16": 0.98, "int8": 0.95, "int4": 0.7}  # share of tokens whose likeliest value stays


@cache
def loaded(name: str, dtype: str = "float32") -> LanguageModel:
    return load(name if name.startswith("shakespeare") else str(GOLDEN / name), dtype=dtype)


def half_masked(lm: LanguageModel, rows: int = 2, length: int = 64) -> Tensor:
    z_BT = torch.randint(TOKENS, (rows, length), generator=torch.Generator().manual_seed(0))
    z_BT[:, ::2] = lm.tokenizer.mask_id
    return z_BT


NAMES = ["llada", "dream", "shakespeare-mask", "shakespeare-block", "shakespeare-uniform", *ADALN]


def distance(base: LanguageModel, lm: LanguageModel) -> tuple[float, float]:
    """(mean KL divergence from the base in nats a token, share of tokens whose likeliest value is another)."""
    z_BT, t_B = half_masked(base, 16, min(64, base.window)), torch.full((16,), 0.5)
    exact_BTV, near_BTV = (one.predict(z_BT, t_B).log_softmax(-1) for one in (base, lm))
    nats_BT = (exact_BTV.exp() * (exact_BTV - near_BTV)).sum(-1)
    return float(nats_BT.mean()), float((exact_BTV.argmax(-1) != near_BTV.argmax(-1)).float().mean())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_distributions_are_near(name: str, dtype: str) -> None:
    base, lm = loaded(name), loaded(name, dtype)
    nats, changed = distance(base, lm)
    assert 0 < nats < NATS[dtype]
    assert changed < 1 - SAME[dtype] + (0.06 if name in ADALN else 0.0)  # weights at random: likeliest tokens that are nearly level
    assert lm.network.quantized == (dtype != "bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_near_to_float32_as_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by torch's own operations, but for the luck of rounding: 1.04 times their divergence and 0.002 more tokens were the most."""
    base, lm = loaded(name), loaded(name, "bfloat16")
    nats, changed = distance(base, lm)
    with monkeypatch.context() as patch:
        patch.setattr(elementwise, "pay", lambda _x: False)
        torchs_nats, torchs_changed = distance(base, lm)
    assert nats <= 1.1 * torchs_nats
    assert changed <= torchs_changed + 0.01


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.9), ("int8", 0.9), ("int4", 0.3)])
def test_generations_at_temperature_0(dtype: str, share: float) -> None:
    """Tokens that the official sampler writes as in float32: one near-tie that falls differently changes what follows."""

    def generated(lm: LanguageModel) -> Tensor:
        plan = official.plan(lm, {"steps": 16, "gen_length": 16, "block_length": 8}, "llada")
        rows = [[*range(8 * row, 8 * row + 8), *[None] * 16] for row in range(8)]
        canvas = Canvas.from_rows(rows, fill=lm.tokenizer.mask_id)
        *_, last = plan.sampler.steps(canvas, rng=generators(0, len(rows)))
        return last.tokens_BT[:, 8:]

    same = (generated(loaded("llada")) == generated(loaded("llada", dtype))).float().mean()
    assert same > share


def plausible(text: str) -> float:
    """Mean log-probability that the float32 model gives every second token, in nats."""
    lm = loaded("shakespeare-mask")
    x_1T = torch.tensor([lm.tokenizer.encode(text)])
    z_1T = x_1T.clone()
    z_1T[:, ::2] = lm.tokenizer.mask_id
    logp_1TV = lm.predict(z_1T, torch.full((1,), 0.5)).log_softmax(-1)
    return float(logp_1TV.gather(-1, x_1T[..., None])[:, ::2].mean())


@cache
def written(policy: str, dtype: str) -> str:
    options: dict[str, Any] = {"length": 96, "steps": 48, "temperature": 0.5, "sampler": "confidence"}
    return loaded("shakespeare-mask", dtype).generate("ROMEO:", cache=policy in POLICIES and policy, **options).text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", [*POLICIES, "none"])
def test_every_cache_policy(policy: str, dtype: str) -> None:
    """A text written with quantized weights is about as likely to the float32 model as its own against the same cache, in nats."""
    exact, near = (written(policy, one) for one in ("float32", dtype))
    assert len(near) == 96
    assert plausible(near) > plausible(exact) - 1.5  # a cache and several tokens a step cost as much as the bits do
    assert plausible(near[::-1]) < plausible(near) - 0.5


@pytest.mark.parametrize("conv", [0, 5])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_pattern(bits: int, conv: int) -> None:
    base, lm = (make_model(attention="block_causal", block_length=8, conv=conv) for _ in range(2))
    prepare(lm.network, bits=bits)
    z_BT = half_masked(base, length=32) % base.config.network.vocab_size
    pairs = [
        (one.network(torch.cat([z_BT, z_BT], 1), pattern=pattern) for one in (base, lm)) for pattern in ("clean", "shadow", "introspective")
    ]
    valid_BT = torch.arange(32) < torch.tensor([[32], [20]])
    pairs += [(one.network(z_BT, valid_BT=valid_BT) for one in (base, lm)), (one.predict_beside(z_BT, z_BT, 4) for one in (base, lm))]
    for exact, near in pairs:
        assert 0 < (near - exact).std() < (0.3 if bits == 4 else 0.05) * exact.std()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.parametrize(("attention", "conv"), [("full", 0), ("full", 5), ("block_causal", 3)])
def test_compiled_texts(attention: str, conv: int) -> None:
    """Rows, lengths and masks change from forward pass to forward pass; another network has compilations of its own."""
    blocks: dict[str, Any] = {"attention": attention, "block_length": 8 * (attention == "block_causal"), "conv": conv}
    plain, made = ([make_model(norm_eps=eps, **blocks) for eps in (1e-6, 1e-2)] for _ in range(2))

    def compare(index: int, rows: int, length: int, *, padded: bool = False) -> None:
        z_BT = half_masked(plain[index], rows, length) % 20
        valid_BT = torch.arange(length) < torch.arange(length, length - rows, -1)[:, None] if padded else None
        found, expected = (one[index].network(z_BT, valid_BT=valid_BT) for one in (made, plain))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    texts: list[int] = []
    for one in made:
        prepare(one.network, compiled=True)
        assert isinstance(one.network.blocks, CompiledBlocks)
        over = one.network.blocks.text
        one.network.blocks.text = lambda *args, over=over: texts.append(1) or over(*args)  # type: ignore[method-assign, func-returns-value]
    with torch.no_grad():
        for shape in ((1, 32), (2, 16), (3, 24), (1, 8)):
            compare(0, *shape)
        compare(0, 2, 16, padded=True)
        compare(1, 1, 32)
        assert len(texts) == 6
        z_BT, index_BC = half_masked(plain[0], 2, 24) % 20, torch.tensor([[5, 0], [3, 23]])
        some = made[0].network(z_BT, index_BC=index_BC)  # the last block at these positions alone
        torch.testing.assert_close(some, plain[0].network(z_BT, index_BC=index_BC), atol=1e-4, rtol=1e-4)
    assert len(texts) == 7
    made[0].generate("a", length=16, steps=4)
    assert len(texts) == 7 or attention == "full"  # block by block against an exact cache, which is not compiled
    assert len(texts) >= 10 or attention == "block_causal"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.parametrize("name", ["gidd", "llada_moe"])
def test_compiled_texts_told_a_level_and_with_experts(name: str) -> None:
    """The noise level changes from row to row; experts are run by their tokens' choice, around compiled attention."""
    plain, made, texts = loaded(name), load(str(GOLDEN / name), compile=True), []
    assert isinstance(made.network.blocks, CompiledBlocks)
    over = made.network.blocks.text
    made.network.blocks.text = lambda *args: texts.append(1) or over(*args)  # type: ignore[method-assign, func-returns-value]
    with torch.no_grad():
        for rows, length in ((2, 16), (1, 24), (3, 8)):
            z_BT, t_B = half_masked(plain, rows, length), torch.linspace(0.2, 0.8, rows)
            torch.testing.assert_close(made.predict(z_BT, t_B), plain.predict(z_BT, t_B), atol=1e-4, rtol=1e-4)
    assert len(texts) == 3


def test_quantized_weights_are_neither_saved_nor_deterministic(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save it from float32"):
        loaded("llada", "int4").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="deterministic decoding is for autoregressive"):
        load("shakespeare-mask", deterministic=True)


def test_a_network_for_the_cpu_is_fused_and_keeps_its_weights() -> None:
    made, plain = loaded("shakespeare-mask").network, LanguageModel.from_pretrained("shakespeare-mask").network
    assert isinstance(made.head, FusedHead)
    assert type(plain.head) is Head
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in plain.state_dict().items())
    z_BT = half_masked(loaded("shakespeare-mask"), rows=3, length=made.config.window)
    with torch.no_grad():
        expected = plain(z_BT)
        torch.testing.assert_close(made(z_BT), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(made(z_BT[:1]), expected[:1], atol=1e-4, rtol=1e-4)
