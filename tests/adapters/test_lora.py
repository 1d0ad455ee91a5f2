"""A gated adapter: nothing happens without masks, the base stays as it is, files that are not right are told apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters.test_objective import adapted, batch
from conftest import make_model
from dlm import bundled
from dlm.adapters import attach, lora
from dlm.adapters.chain import Chain
from dlm.errors import InputError
from dlm.language_model import LanguageModel, load
from dlm.language_model.options import TextKeywords

CONFIG = lora.AdapterConfig(rank=4, alpha=8.0)


def test_a_layer_is_its_formula() -> None:
    torch.manual_seed(0)
    base, embed = nn.Linear(6, 5), lora.MaskEmbedding(nn.Embedding(10, 6), CONFIG, 9)
    layer = lora.LoRALinear.from_base(base, CONFIG, torch.Generator().manual_seed(0))
    x, z, pos = torch.randn(2, 3, 6), torch.tensor([[9, 1, 9], [2, 9, 9]]), torch.tensor([[0, 1, 2], [4, 5, 6]])
    masks = embed.mask_tokens(z, pos)
    assert torch.equal(layer(x, masks), base(x))  # B is zero
    nn.init.normal_(layer.lora_B)
    gate = torch.tensor([[0.0, 0, 1], [0, 1, 1]])[..., None]  # the mask at position 0 is a start token
    expected = base(x) + 8 / 4 * gate * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x, masks), expected)
    assert torch.equal(layer(x), base(x))  # told of no masks
    everywhere = base(x) + 8 / 4 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x, embed.mask_tokens(z.fill_(9), pos + 1)), everywhere)
    assert layer.weight is base.weight
    assert layer.to_base().weight is base.weight


@pytest.mark.parametrize(
    "network",
    [{}, {"mlp": "swiglu", "kv_heads": 1, "tied": True, "qkv_bias": True}, {"conv": 3}],
    ids=["own", "llama-like", "convolution"],
)
def test_text_reads_as_in_the_base(network: dict[str, Any]) -> None:
    base, lm = make_model("autoregressive", **network), adapted(**network)
    mask_id = lm.tokenizer.mask_id
    x_BT, _ = batch(lm)
    assert x_BT[0, 0] == mask_id  # the start token of our own
    assert torch.equal(lm.network(x_BT), base.network(x_BT))
    z_BT = x_BT.clone()
    z_BT[:, 9:] = mask_id
    ours, theirs = lm.network(z_BT), base.network(z_BT)
    assert torch.equal(ours[:, :9], theirs[:, :9])  # in one call shape to the bit
    assert not torch.isclose(ours[:, 9:], theirs[:, 9:]).all(-1).any()
    torch.testing.assert_close(ours[:, :9], base.network(x_BT[:, :9]), atol=1e-5, rtol=1e-5)  # in another nearly
    options = {"pattern": "introspective", "block_length": 3}
    both = torch.cat([torch.full_like(x_BT, mask_id), x_BT], 1)
    assert torch.equal(lm.network(both, **options)[:, 13:], base.network(both, **options)[:, 13:])


@pytest.mark.parametrize("conv", [0, 3])
def test_masks_after_a_cache(conv: int) -> None:
    lm = adapted(conv=conv)
    x_BT, _ = batch(lm)
    z_BT = x_BT.clone()
    z_BT[:, 9:] = lm.tokenizer.mask_id
    cache = lm.network.cache(3)
    parts = [lm.network(z_BT[:, a:b], cache=cache) for a, b in ((0, 6), (6, 10), (10, 13))]
    torch.testing.assert_close(torch.cat(parts, 1), lm.network(z_BT), atol=1e-4, rtol=1e-4)


def test_greedy_text_is_the_base_s() -> None:
    lm, base = adapted(), make_model("autoregressive")
    options: TextKeywords = {"max_new_tokens": 20, "temperature": 0.0}
    assert lm.generate("ROMEO", **options).text == base.generate("ROMEO", **options).text


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("fast_switching")
def test_two_threads_decode_with_one_adapted_network() -> None:
    lm, prompts = adapted(chain=6), ("ROMEO: ", "But soft, what light ")

    def decode(prompt: str) -> tuple[str, int]:
        found = lm.generate(prompt, sampler="strided:3", max_new_tokens=25, seed=3)
        return found.text, found.forwards

    alone = [decode(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(decode, prompts * 8))
    assert together == alone * 8


@pytest.mark.usefixtures("fast_switching")
def test_two_threads_read_masks_and_text_with_one_adapted_network() -> None:
    lm = adapted()
    x_BT, _ = batch(lm)
    z_BT = x_BT.clone()
    z_BT[:, 5:] = lm.tokenizer.mask_id

    def read(tokens_BT: Tensor) -> Tensor:
        with torch.no_grad():
            logits_BTV: Tensor = lm.network(tokens_BT)
        return logits_BTV

    alone = [read(tokens_BT) for tokens_BT in (x_BT, z_BT)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(read, [x_BT, z_BT] * 20))
    assert all(torch.equal(*pair) for pair in zip(together, alone * 20, strict=True))


def test_a_fresh_adapter_changes_nothing_and_detaching_leaves_nothing() -> None:
    lm = make_model("autoregressive")
    before, z_BT = deepcopy(lm.network), torch.full((1, 5), lm.tokenizer.mask_id)
    lora.attach(lm.network, CONFIG, lm.tokenizer.mask_id)
    assert torch.equal(lm.network(z_BT), before(z_BT))
    assert len(lora.adapter_state(lm.network)) == 2 * 6 * 2 + 1  # A and B of six layers, the mlp has no gate; the mask's row
    assert lm.network.state_dict().keys() == before.state_dict().keys()  # what is saved is the base
    lora.attach(lm.network, lora.AdapterConfig(targets=("q", "v")), lm.tokenizer.mask_id)
    assert len(lora.adapter_state(lm.network)) == 2 * 2 * 2 + 1
    lora.detach(lm.network)
    assert str(lm.network) == str(before)
    assert lora.adapter_of(lm.network) is None


def test_the_mask_s_row_learns_and_the_embedding_does_not() -> None:
    lm = adapted(tied=True)
    before = lm.network.embed.weight.clone()
    optimizer = torch.optim.AdamW([p for p in lm.network.parameters() if p.requires_grad], lr=0.1)
    z_BT = torch.tensor([[1, 2, lm.tokenizer.mask_id]])
    lm.network(z_BT).square().sum().backward()
    row = lm.network.get_parameter("embed.mask_row").clone()
    optimizer.step()
    assert torch.equal(lm.network.embed.weight, before)
    assert not torch.equal(lm.network.get_parameter("embed.mask_row"), row)


def test_fingerprints(tmp_path: Path) -> None:
    lm = make_model("autoregressive", tied=True)
    own = lora.fingerprint(lm.network)
    lm.save_pretrained(tmp_path)
    lora.attach(lm.network, CONFIG, lm.tokenizer.mask_id)
    assert lora.fingerprint(lm.network) == own  # the adapter does not count
    assert lora.fingerprint(load(str(tmp_path)).network) == own == lora.fingerprint(load(str(tmp_path), dtype=torch.bfloat16).network)
    with torch.no_grad():
        lm.network.get_parameter("blocks.1.mlp.up.weight")[3, 4] += 0.1
    assert lora.fingerprint(lm.network) != own


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lm = adapted()
    config = lora.AdapterConfig(4, 8.0, stride=3, base=lm.name, fingerprint=lora.fingerprint(lm.network), made={"steps": 7})
    lora.save_adapter(tmp_path / "adapter", lm.network, config)
    return tmp_path / "adapter"


def fresh() -> LanguageModel:
    return make_model("autoregressive")


def test_save_and_load(saved: Path) -> None:
    lm, made = fresh(), adapted()
    config = lora.load_adapter(saved, lm.network, lm.tokenizer.mask_id)
    assert (config.rank, config.alpha, config.targets, config.stride, config.made) == (4, 8.0, lora.TARGETS, 3, {"steps": 7})
    adapter = lora.adapter_of(lm.network)
    assert adapter is not None
    assert adapter.config == config
    assert not any(p.requires_grad for p in lm.network.parameters())
    z_BT = torch.full((2, 6), lm.tokenizer.mask_id)
    assert torch.equal(lm.network(z_BT), made.network(z_BT))
    assert torch.equal(attach.with_adapter(fresh(), saved).network(z_BT), lm.network(z_BT))
    assert sorted(p.name for p in saved.iterdir()) == ["adapter.json", "adapter.safetensors"]


def chain(lm: LanguageModel) -> Chain:
    adapter = lora.adapter_of(lm.network)
    assert adapter is not None
    assert adapter.chain is not None
    return adapter.chain


def test_a_chain_goes_with_its_adapter(tmp_path: Path) -> None:
    made = adapted(chain=6)
    fingerprint = lora.fingerprint(made.network)
    assert fingerprint == lora.fingerprint(fresh().network)  # it is no part of the base
    lora.save_adapter(tmp_path, made.network, lora.AdapterConfig(4, 8.0, stride=8, chain=6, base=made.name, fingerprint=fingerprint))
    lm = attach.with_adapter(fresh(), tmp_path)
    own, loaded = chain(made), chain(lm)
    hidden_ND, before_NSD = torch.randn(2, lm.network.config.width), torch.randn(2, 3, lm.network.config.width)
    assert torch.equal(loaded(2, hidden_ND, before_NSD), own(2, hidden_ND, before_NSD))
    assert not torch.equal(loaded(2, hidden_ND, before_NSD), hidden_ND)
    lora.attach(lm.network, lora.AdapterConfig(4, 8.0, stride=8, chain=6), lm.tokenizer.mask_id)
    assert torch.equal(chain(lm)(2, hidden_ND, before_NSD), hidden_ND)  # fresh, it changes nothing
    attach.begin_with(lm.network, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(*(lora.adapter_state(one.network).values() for one in (lm, made)), strict=True))
    lora.detach(lm.network)
    assert lora.adapter_of(lm.network) is None
    assert not [name for name, _ in lm.network.named_parameters() if name.startswith("chain.")]


def test_bfloat16(saved: Path) -> None:
    lm = fresh()
    lm.network.to(torch.bfloat16)
    x_BT, _ = batch(lm)
    plain = lm.network(x_BT)
    lora.load_adapter(saved, lm.network, lm.tokenizer.mask_id)
    assert lm.network.get_parameter("embed.mask_row").dtype == torch.float32
    assert torch.equal(lm.network(x_BT), plain)
    assert lm.network(x_BT.fill_(lm.tokenizer.mask_id)).dtype == torch.bfloat16


def test_files_of_half_the_size(saved: Path, tmp_path: Path) -> None:
    made = adapted()
    config = lora.load_config(saved)
    lora.save_adapter(tmp_path / "small", made.network, config, dtype=torch.bfloat16)
    sizes = [(path / "adapter.safetensors").stat().st_size for path in (saved, tmp_path / "small")]
    assert sizes[1] < 0.7 * sizes[0]
    lm = attach.with_adapter(fresh(), tmp_path / "small")
    for name, tensor in lora.adapter_state(lm.network).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, lora.adapter_state(made.network)[name].bfloat16().float())


def test_bundled_adapters(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fresh()
    monkeypatch.setattr(bundled, "CHECKPOINTS", saved.parent / "nowhere")
    assert bundled.adapters() == {}
    assert attach.bundled_for(lm.network) is None
    monkeypatch.setattr(bundled, "CHECKPOINTS", saved.parent)
    assert bundled.adapters() == {"adapter": saved}
    assert attach.bundled_for(lm.network) == saved
    z_BT = torch.full((2, 6), lm.tokenizer.mask_id)
    for name in ("adapter", "auto", Path("adapter")):
        assert torch.equal(attach.with_adapter(fresh(), name).network(z_BT), adapted().network(z_BT))
    with torch.no_grad():
        lm.network.head.weight[0] += 1.0
    assert attach.bundled_for(lm.network) is None
    for name, reason in (("auto", "no adapter 'auto' for this base; bundled: adapter"), ("other", "no adapter 'other'")):
        with pytest.raises(InputError, match=reason):
            attach.with_adapter(lm, name)
    with pytest.raises(InputError, match="made for another base"):
        attach.with_adapter(lm, "adapter")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(path: Path) -> None:
    state = load_file(path)
    state["embed.mask_row"][3] = torch.nan
    save_file(state, path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another base": (lambda d: rewrite(d / "adapter.json", fingerprint="0" * 64), "made for another base .*000000000000; this one has"),
    "no config": (lambda d: (d / "adapter.json").unlink(), "no adapter in .*: it has no adapter.json"),
    "no JSON": (lambda d: truncate(d / "adapter.json"), "adapter.json is damaged"),
    "a list": (lambda d: (d / "adapter.json").write_text("[]"), "does not describe an adapter"),
    "no rank": (lambda d: (d / "adapter.json").write_text('{"base": ""}'), "does not describe an adapter .lacks 'rank'"),
    "targets": (lambda d: rewrite(d / "adapter.json", targets=["w"]), "does not describe an adapter .adapter targets are some of q, k"),
    "stride": (lambda d: rewrite(d / "adapter.json", stride=1), "does not describe an adapter .a stride counts from 2"),
    "another rank": (lambda d: rewrite(d / "adapter.json", rank=5), "does not fit its adapter.json"),
    "fewer targets": (lambda d: rewrite(d / "adapter.json", targets=["q"]), "does not fit its adapter.json"),
    "no weights": (lambda d: (d / "adapter.safetensors").unlink(), "adapter.safetensors is missing, truncated or damaged"),
    "half the weights": (lambda d: truncate(d / "adapter.safetensors"), "adapter.safetensors is missing, truncated or damaged"),
    "no numbers": (lambda d: spoil(d / "adapter.safetensors"), "is damaged .*first: embed.mask_row"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_loaded(saved: Path, damage: str) -> None:
    harm, message = DAMAGES[damage]
    harm(saved)
    lm = fresh()
    with pytest.raises(InputError, match=message):
        lora.load_adapter(saved, lm.network, lm.tokenizer.mask_id)
    assert lora.adapter_of(lm.network) is None
    assert not lora.adapter_state(lm.network)


def test_settings_that_cannot_be() -> None:
    for settings, message in (({"rank": 0}, "rank from 1"), ({"alpha": 0.0}, "alpha above 0"), ({"targets": ()}, "got none")):
        with pytest.raises(InputError, match=message):
            lora.AdapterConfig(**settings)
