"""Keys of a config.json and of a GGUF header: whatever stands there, the logits are those of transformers, or one line tells why not."""

from __future__ import annotations

import json
import math
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bases import publish, transformer
from dlm.errors import InputError
from dlm.formats import gguf as reader
from dlm.formats import huggingface, native
from dlm.formats.families.known import FAMILIES
from dlm.formats.families.load import read_shape
from dlm.formats.families.record import Family
from dlm.formats.keys import HARMLESS, Keys
from dlm.language_model import load
from formats.test_gguf import write

NEAR = 1e-3
FAMILY = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def logits_of(network: Any, z_BT: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(z_BT)
    return found


def ids(rows: int, window: int) -> Tensor:
    return torch.randint(rows, (1, min(48, window)), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk, its config, and the transformers model."""

    path: Path
    config: dict[str, Any]
    model: Any


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """By model_type."""
    made: dict[str, Tiny] = {}

    def of(kind: str) -> Tiny:
        if kind not in made:
            model = transformer(FAMILY[kind])
            path = publish(model, tmp_path_factory.mktemp(kind))
            made[kind] = Tiny(path, json.loads((path / "config.json").read_text()), model)
        return made[kind]

    return of


ANYTHING = st.sampled_from([None, True, False, 0, -1, 3, 0.5, math.inf, "x", "", [], {}, [1], {"a": 1}])
LAYERS = st.lists(st.sampled_from(["full_attention", "sliding_attention", "chunked_attention"]), min_size=1, max_size=3)
NUMBERS: dict[str, list[Any]] = {  # of rotary positions
    "factor": [1.0, 2.0, 4, 0.5, 0.0],
    "rope_theta": [1e4, 5e5, 17],
    "original_max_position_embeddings": [8, 16, 64, 100],
    "low_freq_factor": [1.0, 4.0],
    "high_freq_factor": [4.0, 1.0],
    "beta_fast": [32, 4.0, None],
    "beta_slow": [1, 2.0],
    "attention_factor": [None, 1.0, 0.7],
    "mscale": [1.0, 0.5, None],
    "mscale_all_dim": [1.0, 0.8],
    "truncate": [True, False, None],
    "partial_rotary_factor": [1.0, 0.5],
    "short_factor": [[1.0, 2.0, 3.0, 4.0], [1.0]],
    "long_factor": [[1.0, 2.0, 3.0, 4.0], [2.0] * 8],
    "mrope_section": [[2, 1, 1]],
}
NEEDED: dict[str, list[str]] = {
    "default": [],
    "linear": ["factor"],
    "dynamic": ["factor"],
    "yarn": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
    "longrope": ["short_factor", "long_factor"],
    "proportional": ["rope_theta"],
    "mrope": ["mrope_section"],
}


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """Rotary positions that mostly have what their kind needs, and some more."""
    kind = draw(st.sampled_from(sorted(NEEDED)))
    keys = {*NEEDED[kind], *draw(st.lists(st.sampled_from(sorted(NUMBERS)), max_size=3))}
    return {draw(st.sampled_from(["rope_type", "type"])): kind} | {key: draw(st.sampled_from(NUMBERS[key])) for key in sorted(keys)}


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "rope_scaling": ropes(),
    "rope_parameters": ropes(),
    "rope_theta": st.sampled_from([1e4, 5e5]),
    "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
    "original_max_position_embeddings": st.sampled_from([8, 16, 64]),
    "use_sliding_window": st.booleans(),
    "sliding_window": st.sampled_from([4, 63, 64, 4096, None]),
    "max_window_layers": st.sampled_from([0, 1, 2]),
    "layer_types": LAYERS,
    "is_causal": st.booleans(),
    "rms_norm_eps": st.sampled_from([1e-6, 1e-2]),
    "tie_word_embeddings": st.booleans(),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "hidden_act": st.sampled_from(["silu", "swish", "gelu"]),
    "head_dim": st.sampled_from([8, 16, 4]),
    "num_attention_heads": st.sampled_from([2, 4, 8]),
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "max_position_embeddings": st.sampled_from([32, 64, 4096]),
    "num_hidden_layers": st.sampled_from([1, 2, 3]),
    "quantization_config": st.sampled_from([None, {}, {"bits": 4}]),
    "attention_dropout": st.sampled_from([0.0, 0.5]),
    "pretraining_tp": st.sampled_from([1, 2]),
    "attn_logit_softcapping": st.sampled_from([None, 30.0]),
    "logits_scaling": st.sampled_from([1.0, 8.0]),
    "residual_multiplier": st.sampled_from([1.0, 0.22]),
    "num_local_experts": st.sampled_from([0, 8]),
    "attention_sinks": st.booleans(),
    "no_such_key": ANYTHING,
}


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of a config.json with other values, now and then of another type. `...`: the key is left out."""
    found = {}
    for key in draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4, unique=True)):
        found[key] = draw(VALUES[key] if draw(st.integers(0, 7)) else ANYTHING | st.just(...))
    return found


def theirs(config: dict[str, Any], state: dict[str, Tensor], z_BT: Tensor) -> Tensor | None:
    """The logits of transformers; None where it has none, or where the weights do not fit. null says as much as no key."""
    import transformers

    plain = {key: value for key, value in config.items() if value is not None and key not in HARMLESS}
    kind = FAMILY[config["model_type"]]
    try:
        shape = getattr(transformers, f"{kind}Config").from_dict(json.loads(json.dumps(plain)))
        how = {"config": shape, "state_dict": dict(state), "output_loading_info": True}
        model, info = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(None, **how)
        if any(info.values()):
            return None
        return logits_of(lambda z: model.eval()(z).logits, z_BT)
    except Exception:  # whatever it raises
        return None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kind=st.sampled_from(sorted(FAMILY)), changed=changes())
def test_any_config_gives_the_logits_of_transformers_or_one_line(tiny: Callable[[str], Tiny], kind: str, changed: dict[str, Any]) -> None:
    one = tiny(kind)
    config = {key: value for key, value in (one.config | changed).items() if value is not ...}
    stored = huggingface.NAMES.renamed(native.weights(one.path), one.path, native.KINDS)
    try:
        network, read = huggingface.assemble(config, stored, one.path, None, device="cpu", dtype=torch.float32)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    z_BT = ids(one.model.config.vocab_size, read.network.window)
    expected_BTV = theirs(config, one.model.state_dict(), z_BT)
    assert expected_BTV is not None, "it loads here, and not there"
    torch.testing.assert_close(logits_of(network, z_BT)[..., :-1], expected_BTV, atol=NEAR, rtol=NEAR)


HEADER: dict[str, list[Any]] = {
    "rope.scaling.type": ["none", "linear", "yarn", "longrope", ""],
    "rope.scaling.factor": [1.0, 0.0, 4.0, 0.5, math.nan],
    "rope.scale_linear": [1.0, 2.0],
    "rope.scaling.original_context_length": [16, 64],
    "rope.scaling.finetuned": [True],
    "rope.scaling.attn_factor": [1.0, 0.5],
    "rope.scaling.yarn_beta_fast": [32.0],
    "rope.dimension_count": [8, 4],
    "rope.freq_base": [1e4, 5e5, 0.0],
    "attention.causal": [True, False],
    "attention.layer_norm_rms_epsilon": [1e-6, 1e-2],
    "attention.key_length": [8, 16],
    "attention.value_length": [8, 4],
    "attention.head_count_kv": [2, 4, [2, 2]],
    "attention.scale": [0.0, 8**-0.5, 0.1],
    "attention.sliding_window": [0, 16],
    "attn_logit_softcapping": [0.0, 30.0],
    "final_logit_softcapping": [30.0],
    "embedding_scale": [1.0, 12.0],
    "residual_scale": [0.5],
    "logit_scale": [1.0, 0.1],
    "expert_count": [0, 8],
    "feed_forward_length": [48, [48, 48]],
    "block_count": [2, 1],
    "context_length": [64, 128],
    "no_such_key": [1, "x", False],
}
WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")  # of a head
NEUTRAL: dict[str, Any] = {  # keys that need no counterpart in transformers with these values, and are refused with any other
    "rope.scaling.attn_factor": 1.0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "expert_count": 0,
    "block_count": 2,
    "attention.causal": True,
}


def positions(header: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters of a header by the rules of llama.cpp: a scale without type is linear, an older key stands in for it, 0 is none."""
    way, base = header.get("rope.scaling.type", "linear"), header.get("rope.freq_base", 1e4)
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 0.0)) or 1.0
    if way == "none" or factor == 1:
        return {"rope_type": "default", "rope_theta": base}
    found = {"rope_type": way, "rope_theta": base, "factor": factor}
    before = header.get("rope.scaling.original_context_length", header.get("context_length", 64))
    return found | ({"original_max_position_embeddings": before} if way == "yarn" else {})


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(FAMILY)),
    header=st.lists(st.sampled_from(sorted(HEADER)), min_size=1, max_size=3, unique=True).flatmap(
        lambda keys: st.fixed_dictionaries({key: st.sampled_from(HEADER[key]) for key in keys})
    ),
)
def test_any_header_gives_the_logits_of_transformers_or_one_line(
    tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory, kind: str, header: dict[str, Any]
) -> None:
    one, path = tiny(kind), tmp_path_factory.getbasetemp() / "any.gguf"
    write(one.model, path, metadata=header)
    try:
        lm = load(str(path))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    neutral = NEUTRAL | dict.fromkeys(WIDTHS, one.config.get("head_dim", 8))
    assert {key: header[key] for key in neutral.keys() & header.keys()} == {key: neutral[key] for key in neutral.keys() & header.keys()}
    assert "no_such_key" not in header
    config = one.config | {"rope_parameters": positions(header), "max_position_embeddings": lm.window}
    config["rms_norm_eps"] = header.get("attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    z_BT = ids(one.model.config.vocab_size, 64)
    expected_BTV = theirs(config, one.model.state_dict(), z_BT)
    assert expected_BTV is not None
    torch.testing.assert_close(logits_of(lm.network, z_BT)[..., :-1], expected_BTV, atol=NEAR, rtol=NEAR)


SECONDS = 2.0  # that the fuzz of headers takes


@pytest.mark.timeout(60)
def test_a_fuzz_of_headers_for_two_seconds(tmp_path: Path) -> None:
    """Bytes, whole fields and the end of a header at random: each file loads or is refused in one line, and soon."""
    path, rng = write(transformer("Llama"), tmp_path / "tiny.gguf"), np.random.default_rng()
    whole, end = path.read_bytes(), time.monotonic() + SECONDS
    with path.open("rb") as file:
        header = reader.Header(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    size, tried = min(begin for _, _, begin in header.tensors.values()), 0
    fields = [b"\xff" * 8, b"\x00" * 8, b"\x00\x00\x00\x00\x00\x00\x00\x80", b"\x01", rng.bytes(8)]
    while time.monotonic() < end:
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at, field = int(rng.integers(4, size)), fields[int(rng.integers(len(fields)))] if rng.random() < 0.3 else rng.bytes(1)
            data[at : at + len(field)] = field
        cut = len(data) if rng.random() < 0.9 else int(rng.integers(4, size))
        path.write_bytes(data[:cut])
        begun, tried = time.monotonic(), tried + 1
        try:
            load(str(path))
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
        assert time.monotonic() - begun < 5
    assert tried > 10


def test_the_file_wins_over_a_tied_flag(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """As in transformers: a head of its own stays, whatever the flag says; one that is missing is not made up."""
    one = tiny("llama")
    state = load_file(one.path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(one.config | {"tie_word_embeddings": True}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((one.path / name).read_text())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lm, z_BT = load(str(tmp_path)), ids(one.model.config.vocab_size, 64)
    assert not lm.config.network.tied
    torch.testing.assert_close(lm.network(z_BT)[..., :-1], one.model(z_BT).logits.detach(), atol=NEAR, rtol=NEAR)
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(str(tmp_path)).config.network.tied
    (tmp_path / "config.json").write_text(json.dumps(one.config))
    with pytest.raises(InputError, match=r"do not fit its config.json \(first: head.weight\)"):
        load(str(tmp_path))


def test_a_head_in_another_shard_or_part(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """An index that promises a tensor which no shard has is told; a part of a split GGUF file is never taken for a whole tied one."""
    one = tiny("llama")
    one.model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "shards" / name).write_text((one.path / name).read_text())
    z_BT = ids(one.model.config.vocab_size, 64)
    assert torch.equal(load(str(tmp_path / "shards")).network(z_BT), load(str(one.path)).network(z_BT))
    index = tmp_path / "shards" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.layers.0.self_attn.sinks"] = next(iter(data["weight_map"].values()))
    index.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"lacks the tensor model.layers.0.self_attn.sinks, which its index names"):
        load(str(tmp_path / "shards"))
    path = write(one.model, tmp_path / "a.gguf")
    write(one.model, path, general={"split.count": 2})
    with pytest.raises(InputError, match="is one of 2 parts of a model: join them with llama-gguf-split --merge"):
        load(str(path))
    write(one.model, path, general={"general.type": "adapter"})
    with pytest.raises(InputError, match="is of the type 'adapter'"):
        load(str(path))


HUGE: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**9},
    "sliding layers": {"num_hidden_layers": 60_000, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    "a head": {"head_dim": 2**40},
    "a share of the width": {"hidden_size": 2**50},
    "the vocabulary": {"vocab_size": 2**50},
    "the MLP": {"intermediate_size": 2**50},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", HUGE)
def test_sizes_are_told_before_anything_of_them_is_made(case: str, tiny: Callable[[str], Tiny]) -> None:
    one, begun = tiny("qwen2"), time.monotonic()
    stored = huggingface.NAMES.renamed(native.weights(one.path), one.path, native.KINDS)
    with pytest.raises(InputError) as error:
        huggingface.assemble(one.config | HUGE[case], stored, one.path, None, device="cpu", dtype=torch.float32)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begun < 5


def test_a_custom_class_is_told(tiny: Callable[[str], Tiny]) -> None:
    with pytest.raises(InputError, match="may compute something else than LlamaForCausalLM"):
        huggingface.read_config(tiny("llama").config | {"architectures": ["MyLlamaForCausalLM"]}, "here")


GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*/config.json"))


def of_family(path: Path) -> tuple[dict[str, Any], Family]:
    """A golden config and its family."""
    data = json.loads(path.read_text())
    found = [family for family in FAMILIES if family.recognises(data)]
    if not found:
        pytest.skip("read by the bridge to transformers")
    return data, found[0]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parent.name)
def test_an_unknown_key_of_a_family_is_told(path: Path) -> None:
    """Every family, without its weights: the shape is read before them."""
    data, family = of_family(path)
    read_shape(data, family, path.parent)
    with pytest.raises(InputError, match=r"dlm does not know the key logit_cap = 30\.0"):
        read_shape(data | {"logit_cap": 30.0}, family, path.parent)


def others(value: Any) -> list[Any]:
    """Other values in place of one, of its type and of another."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2, value + 1, value / 2, "x"]
    if isinstance(value, dict):
        return [value | {key: one} for key in value for one in others(value[key])]
    return [f"{value}x"] if isinstance(value, str) else [1, True, "x", 0.5] if value is None else ["x"]


UNUSED = {  # in the golden configs: layer_types are all full, no window is beyond the original one, YaRN shortens
    "max_window_layers",
    "rope_parameters.llama_4_scaling_beta",
    "rope_parameters.mscale",
    "rope_parameters.mscale_all_dim",
    "sliding_window",
    "use_sliding_window",
}
SAME = [("router_num_group", 1)]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parent.name)
def test_another_value_of_a_key_makes_another_network_or_is_told(path: Path) -> None:
    """What is read is used: no key of a family is looked at and forgotten."""
    data, family = of_family(path)
    shape, tried = read_shape(data, family, path.parent), 0
    skipped = {*HARMLESS, *family.harmless, *family.noise_keys, *UNUSED}
    for key, value in [(name, value) for name in sorted(data.keys() - skipped) for value in others(data[name])]:
        if isinstance(value, dict) and all(f"{key}.{name}" in skipped for name in value if value[name] != data[key][name]):
            continue
        tried += 1
        try:
            found = read_shape(data | {key: value}, family, path.parent)
        except InputError:
            continue
        assert found != shape or (key, value) in SAME, (key, value)
    assert tried > 10


def test_a_key_counts_as_read_once_it_is_read() -> None:
    keys = Keys({"a": 1, "b": {"c": 2, "d": None, "e": 3}, "f": None})
    assert "a" in keys
    assert set(keys.unread()) == {"a", "b"}
    assert (keys["a"], keys["b"].get("c"), keys.get("nothing")) == (1, 2, None)
    assert keys.unread() == {"b.e": 3}
    keys.refuse_unread("here", ["b.e"])
    with pytest.raises(InputError, match=r"here: dlm does not know the key b\.e = 3: take it out"):
        keys.refuse_unread("here")
    for read in (keys.whole, keys.number, keys.flag):
        with pytest.raises(ValueError, match="f is None"):
            read("f")
