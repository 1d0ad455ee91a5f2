"""Quantized weights are the nearest ones, and a network with them is nearly the one before; it drafts for the whole one.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from dlm.adapters import lora
from dlm.errors import InputError
from dlm.inference import fused, quantize, quantized_linear
from dlm.inference.quantized_linear import GROUP, Int4Linear, Int8Linear, QuantizedLinear, Shortlist
from dlm.language_model import load
from dlm.language_model.options import DecodingOptions
from dlm.models import hardware
from dlm.sampling.autoregressive.draft import DTYPES
from inference.networks import in_calls, model, text


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 40), (32, 64), (5, 7)])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_weights_are_quantized_to_the_nearest_level(kind: type[QuantizedLinear], outputs: int, inputs: int) -> None:
    """Of 255 for each output, or 16 for every 32 weights; products are those of what is written out, for few rows and for many."""
    rng = torch.Generator().manual_seed(0)
    weight_OI, bias_O = torch.randn(outputs, inputs, generator=rng), torch.randn(outputs, generator=rng)
    weight_OI[3] = 0
    layer = kind(weight_OI, bias_O)
    written_OI = layer.dense_weight()[:outputs, :inputs].float()
    groups = [weight_OI] if kind is Int8Linear else list(F.pad(weight_OI, (0, -inputs % GROUP)).split(GROUP, 1))
    spans = [2 * group.abs().amax(1) / 254 if kind is Int8Linear else (group.amax(1) - group.amin(1)) / 15 for group in groups]
    step_OI = torch.cat([span[:, None].expand_as(group) for span, group in zip(spans, groups, strict=True)], 1)[:, :inputs]
    slack_OI = 0.01 * weight_OI.abs().amax(1, keepdim=True)  # scales and weights in bfloat16
    assert bool(((written_OI - weight_OI).abs() <= step_OI / 2 + slack_OI).all())
    assert not written_OI[3].any()
    cases = [
        (rows, packs)
        for packs in (False, hardware.prepacks(torch.bfloat16))
        for rows in (1, 2, 7, layer.kernel_rows_alone, layer.kernel_rows_alone + 1)
    ]
    for rows, layer.packs in cases:
        x = torch.randn(2, rows, inputs, generator=rng)[: 1 + (rows == 2)]
        expected = x.bfloat16().double() @ written_OI.double().T + bias_O
        torch.testing.assert_close(layer(x).double(), expected, atol=0.03 * inputs**0.5, rtol=0.01)


def test_the_best_outputs_are_those_of_the_weights() -> None:
    rng = torch.Generator().manual_seed(0)
    weight_OI, x = torch.randn(400, 64, generator=rng), torch.randn(2, 3, 64, generator=rng)
    layer = Shortlist(weight_OI, 20)
    found, coarse, exact = layer(x), layer.coarse(x), x @ weight_OI.T
    best = torch.zeros_like(coarse, dtype=torch.bool).scatter_(-1, coarse.topk(20, -1).indices, True)
    torch.testing.assert_close(found[best], exact[best], atol=1e-4, rtol=1e-5)
    assert torch.equal(found[~best], coarse[~best])
    assert not torch.equal(coarse[best], exact[best])
    assert torch.equal(found.argmax(-1), exact.argmax(-1))
    assert layer(torch.zeros(2, 0, 64)).shape == (2, 0, 400)


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_no_rows_are_read_too(kind: type[QuantizedLinear]) -> None:
    assert kind(torch.randn(16, 32))(torch.zeros(2, 0, 32)).shape == (2, 0, 16)


@pytest.mark.parametrize("form", ["Q4_1", "Q4_0"])
def test_weights_that_came_in_four_bits_are_reproduced(form: str) -> None:
    """Levels of a file stay levels; products are those of the dequantized weights, up to bfloat16."""
    gguf = pytest.importorskip("gguf")
    rng, kind = torch.Generator().manual_seed(1), gguf.GGMLQuantizationType[form]
    raw = gguf.quantize(torch.randn(64, 96, generator=rng).numpy(), kind)
    weight_OI = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    layer = Int4Linear(weight_OI)
    step_OG1 = layer.scale_GO2.transpose(0, 1)[..., :1].abs().float()
    apart_OGI = torch.unflatten(layer.dense_weight().float() - weight_OI, 1, (-1, GROUP)) / step_OG1
    assert float(apart_OGI.abs().max()) < 0.1  # half a step, were they not levels of ours
    x = torch.randn(3, 96, generator=rng)
    torch.testing.assert_close(layer(x), x @ weight_OI.T, atol=0.15, rtol=0.02)


def test_the_dtype_of_a_copy_that_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_linear, "LARGE_HEAD_WEIGHTS", 1000)
    made = model()
    assert tuple(quantize.BITS) == DTYPES
    assert quantize.draft_dtype(made.network) == "int8"
    assert made.resolve(DecodingOptions(sampler="lossless")).word == "draft:int8:auto"
    up = made.network.get_submodule("blocks.0.mlp.up")
    assert isinstance(up, torch.nn.Linear)
    up.weight.data = Int4Linear(up.weight).dense_weight()[: up.out_features, : up.in_features].float()
    assert quantize.draft_dtype(made.network) == "int4"
    assert quantize.draft_dtype(quantize.quantize(made.network)) == ""
    assert made.resolve(DecodingOptions(sampler="lossless")).word == "lookup:auto"


@pytest.mark.parametrize(("bits", "error"), [("int8", 0.05), ("int4", 0.3)])
def test_a_quantized_network_is_nearly_the_base(bits: str, error: float, tmp_path: Path) -> None:
    made = model(tied=False)
    z_BT = text(made)
    made.save_pretrained(tmp_path)
    rounded = load(str(tmp_path), dtype=bits)
    with torch.no_grad():
        before, after = made.network(z_BT), rounded.network(z_BT)
    assert 0 < (after - before).std() < error * before.std()
    with pytest.raises(InputError, match="save it from float32"):
        rounded.save_pretrained(tmp_path / "again")
    with pytest.raises(InputError, match="the weights are quantized, and an adapter names those before: load both at once"):
        lora.fingerprint(rounded.network)
    with pytest.raises(InputError, match="unknown dtype 'int3'; known: float32, bfloat16, int8, int4"):
        load(str(tmp_path), dtype="int3")
    adapted = model(tied=False)
    config = lora.AdapterConfig(rank=4, fingerprint=lora.fingerprint(adapted.network))
    lora.attach(adapted.network, config, adapted.tokenizer.mask_id)
    lora.save_adapter(tmp_path / "adapter", adapted.network, config)
    both = load(str(tmp_path), dtype=bits, adapter=tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(both.network(z_BT), after)  # a fresh adapter


def test_draft_logits_are_approximate(monkeypatch: pytest.MonkeyPatch) -> None:
    """From large heads alone, and never what is verified."""
    small, large, apart = model(), model(), model(tied=False)
    hidden_BQD = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        also = small.network.read_out(hidden_BQD, draft=True)
    monkeypatch.setattr(quantized_linear, "LARGE_HEAD_WEIGHTS", 1000)
    head = large.network.head
    assert isinstance(head, fused.FusedHead)
    with torch.no_grad():
        large.network.read_out(hidden_BQD, draft=True)
        copy = cast(Shortlist, head.draft_copy)
        copy.best = 5
        exact, coarse = (large.network.read_out(hidden_BQD, draft=way) for way in (False, True))
    assert head.draft_copy is copy  # made once
    assert torch.equal(exact, also)
    exact_large = exact
    assert 0 < (coarse - exact).std() < 0.1 * exact.std()
    torch.testing.assert_close(*(logits.topk(2, -1).values for logits in (exact, coarse)), atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # the embedding does not hold this head's weights
        exact, coarse = (apart.network.read_out(hidden_BQD, draft=way) for way in (False, True))
    assert 0 < (coarse - exact).std() < 0.02 * exact.std()
    assert large.network.state_dict().keys() == small.network.state_dict().keys()
    read: list[int] = []
    copy.register_forward_hook(lambda *_: read.append(1))
    for made in (small, large):
        lora.attach(made.network, lora.AdapterConfig(2, stride=3, chain=8), made.tokenizer.mask_id)
    options: dict[str, Any] = {"length": 40, "seed": 3}
    drafted = large.generate("ROMEO", **options, sampler="strided:3").text
    assert len(read) > 10
    monkeypatch.undo()
    plain, exact_drafts = (small.generate("ROMEO", **options, sampler=word).text for word in ("lookup:1", "strided:3"))
    assert [drafted, exact_drafts] == [plain] * 2
    with torch.no_grad():
        large.network.head.weight.mul_(2.0)
    monkeypatch.setattr(quantized_linear, "LARGE_HEAD_WEIGHTS", 1000)
    with torch.no_grad():
        torch.testing.assert_close(large.network.read_out(hidden_BQD, draft=True).amax(-1), 2 * exact_large.amax(-1))  # and made anew


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_model_drafts_for_itself(bits: str, tmp_path: Path) -> None:
    made = model(layers=3)
    lora.attach(made.network, lora.AdapterConfig(2), made.tokenizer.mask_id)  # has no part in it
    plain = made.generate("ROMEO", length=60, seed=3)
    drafted = made.generate("ROMEO", length=60, seed=3, sampler=f"draft:{bits},4")
    assert drafted.text == plain.text
    assert plain.forwards / drafted.forwards > 2
    copy = made.quantized(bits)
    assert copy.quantized
    assert not made.network.quantized
    assert copy.embed.weight.data_ptr() == made.network.embed.weight.data_ptr()
    made.save_pretrained(tmp_path)
    rounded = load(str(tmp_path), dtype=bits)
    assert torch.equal(in_calls(rounded.network, text(made), 1), in_calls(copy, text(made), 1))
    with pytest.raises(InputError, match="quantized already"):
        rounded.generate("ROMEO", sampler=f"draft:{bits},4")
