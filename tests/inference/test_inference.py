"""A network made ready for decoding says what it said before; rounded to a few bits nearly, and steady to the bit.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import make_model
from dlm.adapters import lora
from dlm.errors import InputError
from dlm.inference import compiled, fused, packed, quantize
from dlm.inference.quantized_linear import GROUP, Int4Linear, Int8Linear, RoundedLinear, Shortlist
from dlm.language_model import LanguageModel, load
from dlm.models.transformer import Transformer
from dlm.sampling.autoregressive.draft import DTYPES

LLAMA = {"mlp": "swiglu", "heads": 6, "kv_heads": 2, "width": 48, "mlp_width": 96, "qk_norm": False, "tied": True}
OURS = {"mlp": "relu2", "qkv_bias": True}
LENGTH = 72  # more than one block of keys


def model(**changes: Any) -> LanguageModel:
    return make_model("autoregressive", window=LENGTH, context=8, **(LLAMA | changes))


def text(made: LanguageModel, rows: int = 3) -> Tensor:
    return torch.randint(made.tokenizer.vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def in_calls(network: Transformer, z_BT: Tensor, size: int, room: int = LENGTH, cache: Any = None) -> Tensor:
    """Logits from calls of so many positions against a cache."""
    cache, found = cache or network.ragged_cache(len(z_BT), room), []
    for begin in range(0, z_BT.shape[1], size):
        z_BQ = z_BT[:, begin : begin + size]
        queries = z_BQ.shape[1]
        pos_BQ = (begin + torch.arange(queries)).expand_as(z_BQ)
        own_BQQ = torch.ones(len(z_BT), queries, queries, dtype=torch.bool).tril()
        found.append(network(z_BQ, pos_BQ=pos_BQ, own_BQQ=own_BQQ, cache=cache))
    return torch.cat(found, 1)


@pytest.mark.parametrize("sizes", [LLAMA, OURS], ids=["llama", "ours"])
def test_fused_logits_are_those_before(sizes: dict[str, Any]) -> None:
    made = model(**sizes)
    z_BT = text(made)
    with torch.no_grad():
        before = made.network(z_BT)
        fused.fuse(made.network)
        assert made.network.blocks[0].attention.joined is not None
        torch.testing.assert_close(made.network(z_BT), before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(in_calls(made.network, z_BT, 1), before, atol=1e-4, rtol=1e-4)


def test_fused_weights_are_the_layers_own(tmp_path: Path) -> None:
    plain, made = model(), model()
    fused.fuse(made.network)
    assert made.network.parameters_count() == plain.network.parameters_count()
    assert lora.fingerprint(made.network) == lora.fingerprint(plain.network)
    made.save_pretrained(tmp_path)
    again = load(str(tmp_path)).network.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.network.state_dict().items())
    # a step of training reaches what is read without gradients
    made.network.requires_grad_(True)
    optimizer, z_BT = torch.optim.SGD(made.network.parameters(), lr=1.0), text(made)
    made.network(z_BT).logsumexp(-1).mean().backward()
    assert made.network.blocks[1].attention.k.weight.grad is not None
    optimizer.step()
    with torch.no_grad():
        joined = made.network(z_BT)
    torch.testing.assert_close(joined, made.network(z_BT), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(joined, plain.network(z_BT), atol=1e-3)
    half = fused.fuse(made.network.to(torch.bfloat16))  # moved apart by the cast, and joined again
    assert half.blocks[0].mlp.joined.weight.data_ptr() == half.blocks[0].mlp.gate.weight.data_ptr()


@pytest.mark.parametrize(("dtype", "close", "least"), [(torch.float32, 1e-5, 3), (torch.bfloat16, 0.05, 1)])
def test_a_second_layout_gives_the_same_products(dtype: torch.dtype, close: float, least: int) -> None:
    """It is made when it is first needed, and again when the weights change."""
    layers = [torch.nn.Linear(24, 40, dtype=dtype), torch.nn.Linear(24, 8, dtype=dtype)]
    product = fused.Product(layers)
    product.packs = packed.available(dtype)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for change in (0.0, 1.0):
            layers[1].weight.add_(change)
            for rows in (1, 2, 3, 17, 256, 257):
                x_BNI = torch.randn(1, rows, 24, generator=rng).to(dtype)
                found = product(x_BNI)
                torch.testing.assert_close(found, torch.cat([layer(x_BNI) for layer in layers], -1), atol=close, rtol=close)
                assert (product.laid_out is not None) == (product.packs and (rows >= least or change > 0))
                assert found.shape == (1, rows, 48)


def test_large_networks_are_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = model(), model()
    fused.fuse(small.network)
    assert fused.fuse(model().network.bfloat16()).head_product.packs == packed.available(torch.bfloat16)  # type: ignore[union-attr]
    monkeypatch.setattr(fused, "MOST", 1000)
    fused.fuse(large.network)
    assert small.network.head_product.packs
    assert not large.network.head_product.packs


@pytest.mark.parametrize("ready", [fused.fuse, quantize.quantize])
@pytest.mark.parametrize("first", ["adapter", "network"])
def test_adapters_before_and_after(ready: Any, first: str) -> None:
    made, without = model(), model()
    config, mask_id = lora.AdapterConfig(rank=4, alpha=8.0), made.tokenizer.mask_id
    reference = ready(deepcopy(without.network))
    if first == "adapter":
        lora.attach(made.network, config, mask_id)
        ready(made.network)
    else:
        lora.attach(ready(made.network), config, mask_id)
    for name, tensor in lora.adapter_state(made.network).items():
        if name.endswith("lora_B"):
            tensor.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    z_BT = text(made)
    z_BT[:, 40:] = mask_id
    with torch.no_grad():
        adapted, base = made.network(z_BT), reference(z_BT)
        assert torch.equal(adapted[:, :40], base[:, :40])
        assert not torch.isclose(adapted[:, 40:], base[:, 40:]).all(-1).any()
        if ready is fused.fuse:
            with torch.enable_grad():
                separate = made.network(z_BT)
            torch.testing.assert_close(adapted, separate, atol=1e-5, rtol=1e-5)
        lora.detach(made.network)
        assert torch.equal(made.network(z_BT), base)


@pytest.mark.parametrize("targets", [lora.TARGETS, ("k", "down"), ("up",)])
def test_low_ranks_that_read_the_same_act_together(targets: tuple[str, ...]) -> None:
    """As each by itself, whatever became of the adapter since the last call; all masks, some, and none."""
    made, rng = model(), torch.Generator().manual_seed(3)
    mask_id = made.tokenizer.mask_id
    z_BT = text(made)
    some_BT, all_BT = z_BT.clone(), torch.full_like(z_BT, mask_id)
    some_BT[:, ::3] = mask_id
    fused.fuse(made.network)
    with torch.no_grad():
        for rank in (2, 2, 3):
            lora.attach(made.network, lora.AdapterConfig(rank, 4.0, targets), mask_id)
            for _ in range(2):
                for name, tensor in lora.adapter_state(made.network).items():
                    if name.endswith("lora_B"):
                        tensor.normal_(0.0, 0.3, generator=rng)
                for read_BT in (some_BT, all_BT[:, 1:], z_BT):
                    together = in_calls(made.network, read_BT, 8) if read_BT.shape[1] == LENGTH else made.network(read_BT)
                    with torch.enable_grad():
                        apart = made.network(read_BT)
                    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 40), (32, 64), (5, 7)])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_weights_are_rounded_to_the_nearest_level(kind: type[RoundedLinear], outputs: int, inputs: int) -> None:
    """Of 255 for each output, or 16 for every 32 weights; products are those of what is written out, for few rows and for many."""
    rng = torch.Generator().manual_seed(0)
    weight_OI, bias_O = torch.randn(outputs, inputs, generator=rng), torch.randn(outputs, generator=rng)
    weight_OI[3] = 0
    layer = kind(weight_OI, bias_O)
    written_OI = layer.written_out()[:outputs, :inputs].float()
    groups = [weight_OI] if kind is Int8Linear else list(F.pad(weight_OI, (0, -inputs % GROUP)).split(GROUP, 1))
    spans = [2 * group.abs().amax(1) / 254 if kind is Int8Linear else (group.amax(1) - group.amin(1)) / 15 for group in groups]
    step_OI = torch.cat([span[:, None].expand_as(group) for span, group in zip(spans, groups, strict=True)], 1)[:, :inputs]
    slack_OI = 0.01 * weight_OI.abs().amax(1, keepdim=True)  # scales and weights in bfloat16
    assert bool(((written_OI - weight_OI).abs() <= step_OI / 2 + slack_OI).all())
    assert not written_OI[3].any()
    cases = [(rows, packs) for packs in (False, packed.available(torch.bfloat16)) for rows in (1, 2, 7, layer.short, layer.short + 1)]
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
def test_no_rows_are_read_too(kind: type[RoundedLinear]) -> None:
    assert kind(torch.randn(16, 32))(torch.zeros(2, 0, 32)).shape == (2, 0, 16)


def test_weights_that_came_in_four_bits_are_met_again() -> None:
    rng = torch.Generator().manual_seed(1)
    code_OGI = torch.randint(16, (32, 3, GROUP), generator=rng)
    code_OGI[..., 0], code_OGI[..., 1] = 0, 15  # as a group has them whose ends they stand for
    scale, low = torch.rand(32, 3, 1, generator=rng) + 0.5, torch.randn(32, 3, 1, generator=rng)
    layer = Int4Linear((code_OGI * scale + low).flatten(1))
    met_OI = torch.stack([layer.codes & 15, layer.codes >> 4], -1).flatten(1)
    assert torch.equal(met_OI, code_OGI.flatten(1).to(torch.uint8))


def test_what_a_copy_is_rounded_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "LARGE", 1000)
    made = model()
    assert tuple(quantize.BITS) == DTYPES
    assert quantize.worth_rounding(made.network) == "int8"
    assert made.chosen({"sampler": "lossless"})["sampler"] == "draft:int8,auto"
    up = made.network.blocks[0].mlp.up
    up.weight.data = Int4Linear(up.weight).written_out()[: up.out_features, : up.in_features].float()
    assert quantize.worth_rounding(made.network) == "int4"
    assert quantize.worth_rounding(quantize.quantize(made.network)) == ""
    assert made.chosen({"sampler": "lossless"})["sampler"] == "lookup:auto"


@pytest.mark.parametrize(("bits", "error"), [("int8", 0.05), ("int4", 0.3)])
def test_a_rounded_network_is_nearly_the_base(bits: str, error: float, tmp_path: Path) -> None:
    made = model(tied=False)
    z_BT = text(made)
    made.save_pretrained(tmp_path)
    rounded = load(str(tmp_path), dtype=bits)
    with torch.no_grad():
        before, after = made.network(z_BT), rounded.network(z_BT)
    assert 0 < (after - before).std() < error * before.std()
    with pytest.raises(InputError, match="save it from float32"):
        rounded.save_pretrained(tmp_path / "again")
    with pytest.raises(InputError, match="load both at once"):
        lora.fingerprint(rounded.network)
    with pytest.raises(InputError, match="unknown dtype 'int3'; known: float32, bfloat16, int8, int4"):
        load(str(tmp_path), dtype="int3")
    make_model().save_pretrained(tmp_path / "masked")
    with pytest.raises(InputError, match="is a diffusion model: int8"):
        load(str(tmp_path / "masked"), dtype=bits)
    adapted = model(tied=False)
    config = lora.AdapterConfig(rank=4, fingerprint=lora.fingerprint(adapted.network))
    lora.attach(adapted.network, config, adapted.tokenizer.mask_id)
    lora.save_adapter(tmp_path / "adapter", adapted.network, config)
    both = load(str(tmp_path), dtype=bits, adapter=tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(both.network(z_BT), after)  # a fresh adapter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_steady_network_does_not_see_how_it_is_called(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "LARGE", 1000)  # in few bits a shortlist, too
    model().save_pretrained(tmp_path)
    made = load(str(tmp_path), dtype=dtype, deterministic=True)
    z_BT = text(made)
    whole = in_calls(made.network, z_BT, LENGTH)
    for size in (1, 4, 7, 16):
        assert torch.equal(in_calls(made.network, z_BT, size), whole), size
    assert torch.equal(in_calls(made.network, z_BT[1:2], 4), whole[1:2])
    with torch.no_grad():
        cache = made.network.cache(3)
        assert torch.equal(torch.cat([made.network(z_BT[:, i : i + 1], cache=cache) for i in range(LENGTH)], 1), whole)
        assert torch.equal(made.network(z_BT), whole)
        plain = load(str(tmp_path), dtype=dtype).network(z_BT)
    close = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.02, "int4": 0.1}[dtype]
    torch.testing.assert_close(whole, plain, atol=close, rtol=close)


def test_near_ties_fall_alike(tmp_path: Path) -> None:
    """In bfloat16 what is likeliest depends on how many positions a call has, but not when the network is steady."""
    model(layers=4).save_pretrained(tmp_path)
    unsteady, steady = (load(str(tmp_path), dtype="bfloat16", deterministic=registry) for registry in (False, True))
    z_BT = torch.randint(unsteady.tokenizer.vocab_size, (24, LENGTH), generator=torch.Generator().manual_seed(1))
    flips = [int((in_calls(m.network, z_BT, 1).argmax(-1) != in_calls(m.network, z_BT, 15).argmax(-1)).sum()) for m in (unsteady, steady)]
    assert flips[0] > 0
    assert flips[1] == 0
    options = {"temperature": 0.0, "max_new_tokens": 24}
    for word in ("lookup:4", "strided:3"):
        assert steady.generate("ROMEO", sampler=word, **options).text == steady.generate("ROMEO", **options).text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.parametrize(("ready", "close", "ranks"), [(fused.fuse, 1e-4, (2, 5)), (quantize.quantize, 0.02, (2,))])
def test_compiled_calls_say_what_they_said(ready: Any, close: float, ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, positions, masks, adapters and the cache's room change from call to call; another network has compilations of its own."""
    monkeypatch.setattr(compiled, "TOGETHER", 3 if ready is fused.fuse else 1)  # both blocks in a graph, or each in its own
    one, other = model(layers=2), model(layers=2, norm_eps=1e-2)  # the same shapes
    z_BT = text(one)
    masked_BT = z_BT.clone()
    masked_BT[:, 1::2] = one.tokenizer.mask_id
    calls, masked = [(z_BT[:1], 1, 80), (z_BT[:2], 3, 100), (z_BT[:2], 4, 72)], [(masked_BT[:1], 4, 80)]

    def compare(made: LanguageModel, calls: list[tuple[Tensor, int, int]]) -> None:
        compiled, made.network.compiled = made.network.compiled, None
        before = [in_calls(made.network, *call) for call in calls]
        made.network.compiled = watched = Watched(compiled)
        for call, expected in zip(calls, before, strict=True):
            torch.testing.assert_close(in_calls(made.network, *call), expected, atol=close, rtol=close)
        assert watched.calls == sum(len(range(0, LENGTH, size)) for _, size, _ in calls)
        made.network.compiled = compiled

    for made in (one, other):
        compiled.compile(ready(made.network))
    compare(one, calls)
    if ready is fused.fuse:
        compare(other, calls[:1])
    for rank in ranks:
        lora.attach(one.network, lora.AdapterConfig(rank, 4.0, stride=3), one.tokenizer.mask_id)
        for name, tensor in one.network.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(tensor, std=0.1)
        compare(one, calls[:1] + masked)
    lora.detach(one.network)
    compare(one, calls[:1])


class Watched:
    """How often compiled blocks were called."""

    def __init__(self, compiled: Any) -> None:
        self.compiled, self.calls = compiled, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.compiled(*args)


@torch.no_grad()
def test_rows_that_end_apart_are_not_compiled() -> None:
    made = model(layers=2)
    z_B1, apart_B = text(made)[:, :1], torch.tensor([5, 9, 9])
    found = []
    for ready in (fused.fuse, compiled.compile):
        ready(made.network)
        cache = made.network.ragged_cache(3, LENGTH)
        in_calls(made.network, text(made)[:, :10], 10, cache=cache)
        cache.trim(apart_B)
        own_B11 = torch.ones(3, 1, 1, dtype=torch.bool)
        found.append(made.network(z_B1, pos_BQ=apart_B[:, None], own_BQQ=own_B11, cache=cache))
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@torch.no_grad()
def test_both_caches_use_what_was_compiled_for_one() -> None:
    """The same shape of the input, with positions of every row or of all."""
    made = model(layers=1)
    z_BT = text(made)
    before = in_calls(made.network, z_BT, 4)
    compiled.compile(made.network)
    for _ in range(2):
        torch.testing.assert_close(in_calls(made.network, z_BT, 4), before, atol=1e-4, rtol=1e-4)
        cache = made.network.cache(3)
        found = [made.network(z_BT[:, i : i + 4], cache=cache) for i in range(0, LENGTH, 4)]
        torch.testing.assert_close(torch.cat(found, 1), before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_full_cache_says_so_when_compiled() -> None:
    made = compiled.compile(model(layers=1).network)
    cache = made.cache(1, 4)
    with pytest.raises(ValueError, match="holds 4 positions, 5 were asked for"):
        made(torch.zeros(1, 5, dtype=torch.long), cache=cache)


def test_guesses_are_read_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    """From large heads alone, and never what is verified."""
    small, large, apart = model(), model(), model(tied=False)
    quantize.coarsen(small.network)
    monkeypatch.setattr(quantize, "LARGE", 1000)
    quantize.coarsen(large.network)
    quantize.coarsen(apart.network)
    cast(Shortlist, large.network.coarse).best = 5
    hidden_BQD = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, coarse, also = (m.network.read_out(hidden_BQD, coarsely=way) for m, way in ((large, False), (large, True), (small, True)))
    assert torch.equal(exact, also)
    assert 0 < (coarse - exact).std() < 0.1 * exact.std()
    torch.testing.assert_close(*(logits.topk(2, -1).values for logits in (exact, coarse)), atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # the embedding does not hold this head's weights
        exact, coarse = (apart.network.read_out(hidden_BQD, coarsely=way) for way in (False, True))
    assert 0 < (coarse - exact).std() < 0.02 * exact.std()
    assert large.network.state_dict().keys() == small.network.state_dict().keys()
    read: list[int] = []
    large.network.coarse.register_forward_hook(lambda *_: read.append(1))  # type: ignore[union-attr]
    for made in (small, large):
        lora.attach(made.network, lora.AdapterConfig(2, stride=3, chain=8), made.tokenizer.mask_id)
    options: dict[str, Any] = {"length": 40, "seed": 3}
    plain, *guessed = (
        made.generate("ROMEO", **options, sampler=word).text
        for made, word in ((small, "lookup:1"), (small, "strided:3"), (large, "strided:3"))
    )
    assert guessed == [plain] * 2
    assert len(read) > 10


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
    with pytest.raises(InputError, match="rounded already"):
        rounded.generate("ROMEO", sampler=f"draft:{bits},4")


def test_what_cannot_be_compiled(masked_dir: Path, autoregressive_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="compiled decoding are for autoregressive"):
        load(str(masked_dir), compile=True)
    with pytest.raises(InputError, match="choose deterministic or compiled"):
        load(str(autoregressive_dir), compile=True, deterministic=True)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match="install g"):
        load(str(autoregressive_dir), compile=True)
