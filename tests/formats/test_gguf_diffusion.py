"""GGUF files of diffusion models, written here from golden checkpoints as llama.cpp's converter does, read as those checkpoints are.

The converter interleaves the rows of q and k of LLaDA, as of Llama, leaves Dream's as they are, and fills the vocabulary up with unused
tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dlm.errors import InputError
from dlm.formats import gguf as reader
from dlm.formats import huggingface
from dlm.formats.families import llada
from dlm.formats.names import Names
from dlm.language_model import load, official
from dlm.sampling.draw import generators
from dlm.text import byte_level
from dlm.trajectory import Canvas
from gguf_files import add_tensors, close, converted

GOLDEN = Path(__file__).parents[1] / "golden"
NEAR = 3e-5  # of logits from those of the reference
MASKS = {"llada": 277, "dream": 276, "a2d_qwen2": 277, "sdar": 277}
OF_FAMILY: dict[str, Names] = {"llada": llada.NAMES, **dict.fromkeys(("dream", "a2d_qwen2", "sdar"), huggingface.NAMES)}
SIZES = {  # of Dream's config.json and of LLaDA's
    "embedding_length": ("hidden_size", "d_model"),
    "block_count": ("num_hidden_layers", "n_layers"),
    "feed_forward_length": ("intermediate_size", "mlp_hidden_size"),
    "head_count": ("num_attention_heads", "n_heads"),
    "head_count_kv": ("num_key_value_heads", "n_kv_heads"),
    "context_length": ("max_position_embeddings", "max_sequence_length"),
}


def write(name: str, path: Path, quantization: str = "F32", **changes: Any) -> Path:
    """changes: permute, shift, mask, causal, pre: other values of what the converter writes; None leaves a key out."""
    import gguf

    config = json.loads((GOLDEN / name / "config.json").read_text())
    sizes = {key: config.get(keys[0], config.get(keys[1])) for key, keys in SIZES.items()}
    settings: dict[str, Any] = {
        "shift": False if name == "llada" else None,
        "mask": MASKS[name],
        "causal": False if "arch" not in changes else None,
        "permute": name == "llada",
    } | changes
    writer = gguf.GGUFWriter(path, settings.get("arch", name))
    for key, value in sizes.items():
        getattr(writer, f"add_{key}")(value)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if settings["causal"] is not None:
        writer.add_causal_attention(settings["causal"])
    if settings["shift"] is not None:
        writer.add_diffusion_shift_logits(settings["shift"])
    _write_vocabulary(writer, name, config["vocab_size"], settings)
    heads = {"attention.q": sizes["head_count"], "attention.k": sizes["head_count_kv"]} if settings["permute"] else {}
    state = load_file(GOLDEN / name / "model.safetensors")
    add_tensors(writer, converted(state, OF_FAMILY[name], reader.NAMES, heads), quantization)
    close(writer)
    return path


def _write_vocabulary(writer: Any, name: str, rows: int, settings: dict[str, Any]) -> None:
    inner = byte_level.read(GOLDEN / name)
    known = {i: token for token, i in inner.get_vocab(with_added_tokens=True).items()}
    added = {i: token.special for i, token in inner.get_added_tokens_decoder().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(settings.get("pre", "llada-moe" if name == "llada" else "qwen2"))
    writer.add_token_list([known.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([5 if i not in known else (3 if added[i] else 4) if i in added else 1 for i in range(rows)])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(inner.to_str())["model"]["merges"]])
    writer.add_bos_token_id(272)
    writer.add_eos_token_id(273 if name == "llada" else 272)
    if settings["mask"] is not None:
        writer.add_mask_token_id(settings["mask"])
    writer.add_chat_template(load(str(GOLDEN / name)).chat.source)


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "golden.safetensors")


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_file_is_the_checkpoint_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    numbers, base, lm = golden(name), load(str(GOLDEN / name)), load(str(write(name, tmp_path / "tiny.gguf")))
    assert apart(lm.logits(numbers["input_ids"]), numbers["logits"]) < NEAR
    assert torch.equal(lm.logits(numbers["input_ids"]), base.logits(numbers["input_ids"]))
    assert (lm.config, lm.stops, lm.defaults) == (base.config, base.stops, base.defaults)
    text = "the worst <|mask|> and an ou 世界 1234\n\n🙂"
    assert lm.tokenizer.encode(text) == base.tokenizer.encode(text)
    assert lm.tokenizer.pieces() == base.tokenizer.pieces()
    assert lm.prompt_ids("the") == base.prompt_ids("the")
    assert lm.name == "tiny"


@pytest.mark.parametrize(
    ("name", "arch", "family", "key"), [("a2d_qwen2", "qwen2", "open-dcoder", "logits"), ("sdar", "qwen3", "i-dlm", "causal_logits")]
)
def test_a_plain_file_is_read_as_of_a_family_by_name(name: str, arch: str, family: str, key: str, tmp_path: Path) -> None:
    numbers, file = golden(name), write(name, tmp_path / "tiny.gguf", arch=arch)
    assert apart(load(str(file), family=family).logits(numbers["input_ids"]), numbers[key]) < NEAR
    with pytest.raises(InputError, match=f"is a GGUF file of a {arch} model: the family diffullama is one of a llama file"):
        load(str(file), family="diffullama")
    with pytest.raises(InputError, match="the family sdar has no GGUF form"):
        load(str(file), family="sdar")


def test_it_writes_what_the_reference_writes(tmp_path: Path) -> None:
    lm = load(str(write("llada", tmp_path / "tiny.gguf")))
    case = json.loads((GOLDEN / "llada" / "generations.json").read_text())["cases"][0]
    plan = official.plan(lm, case["settings"])
    canvas = Canvas.from_rows([[*case["prompt_ids"][0], *[None] * plan.max_new_tokens]], fill=lm.tokenizer.mask_id)
    *_, last = plan.sampler.steps(canvas, rng=generators(0, 1))
    assert last.tokens_BT[0].tolist() == case["output_ids"][0]


@pytest.mark.parametrize(("name", "permute"), [("llada", False), ("dream", True)])
def test_rows_in_the_other_order_are_told_from_the_right_ones(name: str, permute: bool, tmp_path: Path) -> None:
    numbers, lm = golden(name), load(str(write(name, tmp_path / "tiny.gguf", permute=permute)))
    assert apart(lm.logits(numbers["input_ids"]), numbers["logits"]) > 0.1


@pytest.mark.parametrize(
    ("name", "stated", "shift"), [("llada", None, False), ("llada", True, True), ("dream", None, True), ("dream", False, False)]
)
def test_the_shift_is_that_of_the_file_or_of_the_architecture(name: str, stated: bool | None, shift: bool, tmp_path: Path) -> None:
    assert load(str(write(name, tmp_path / "tiny.gguf", shift=stated))).config.shift == shift


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_mask_that_no_key_names_is_found_by_its_text(name: str, tmp_path: Path) -> None:
    assert load(str(write(name, tmp_path / "tiny.gguf", mask=None))).tokenizer.mask_id == MASKS[name]


NATS = {"F16": 1e-5, "BF16": 1e-3, "Q8_0": 1e-3, "Q5_0": 0.05, "Q5_1": 0.05, "Q4_0": 0.25, "Q4_1": 0.15}  # mean KL from float32 weights


@pytest.mark.parametrize("quantization", NATS)
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_quantized_files(name: str, quantization: str, tmp_path: Path) -> None:
    """Every kind that gguf writes. int4 holds what Q4_0 and Q4_1 hold, up to rounding; others come as near as quantizing again."""
    numbers, path = golden(name), write(name, tmp_path / "tiny.gguf", quantization)
    lm = load(str(path))

    def nats(exact: Tensor, near: Tensor) -> float:
        exact_BTV, near_BTV = exact.log_softmax(-1), near.log_softmax(-1)
        return float((exact_BTV.exp() * (exact_BTV - near_BTV)).sum(-1).mean())

    held = lm.logits(numbers["input_ids"])
    assert 0 < nats(numbers["logits"], held) < NATS[quantization]
    for dtype, most in {"int8": 3e-3, "int4": {"Q4_1": 3e-3, "Q4_0": 3e-3}.get(quantization, 0.2)}.items():
        assert 0 < nats(held, load(str(path), dtype=dtype).logits(numbers["input_ids"])) < most


def test_bad_files_get_one_line(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "has causal attention, which no llada checkpoint has": {"causal": True},
        "puts the mask at 280, where the tokenizer has no token": {"mask": 280},
        "kind gpt2/novel": {"pre": "novel"},
        "is a checkpoint of kind 'diffuse'; dlm converts llama, qwen2, qwen3, llada, dream": {"arch": "diffuse"},
    }
    for message, changes in cases.items():
        with pytest.raises(InputError) as error:
            load(str(write("llada", tmp_path / "bad.gguf", **changes)))
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_cut_anywhere_is_told(tmp_path: Path) -> None:
    path = write("llada", tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for keep in (1, 24, 60, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(InputError, match="is no whole GGUF file"):
            load(str(path))
