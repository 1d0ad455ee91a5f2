"""GGUF files of LLaDA-MoE, written here from the golden checkpoint as llama.cpp's converter does, read as that checkpoint is.

The converter stacks the experts of a layer, leaves the rows of q and k as they are, and writes no feed_forward_length.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dlm.errors import InputError
from dlm.formats import gguf as reader
from dlm.formats.families import llada_moe
from dlm.language_model import load
from formats.test_families import GOLDEN, NEAR, apart, golden
from formats.test_gguf_diffusion import _write_vocabulary
from gguf_files import add_tensors, close

NAME = "llada_moe"


def write(path: Path, quantization: str = "F32", **changes: Any) -> Path:
    """changes: mask, causal, drop: the beginning of tensors that are left out; others are keys of the writer's experts."""
    import gguf

    config = json.loads((GOLDEN / NAME / "config.json").read_text())
    settings: dict[str, Any] = {"mask": 277, "causal": False, "pre": "llada-moe", "drop": "none", "order": 1} | changes
    writer = gguf.GGUFWriter(path, "llada-moe")
    sizes = {
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "head_count": "num_attention_heads",
        "head_count_kv": "num_key_value_heads",
        "context_length": "max_position_embeddings",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "expert_intermediate_size",
    }
    for key, theirs in sizes.items():
        getattr(writer, f"add_{key}")(config[theirs])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_causal_attention(settings["causal"])
    writer.add_diffusion_shift_logits(False)
    for key in {"expert_weights_norm", "expert_gating_func", "expert_weights_scale"} & changes.keys():
        getattr(writer, f"add_{key}")(changes[key])
    _write_vocabulary(writer, NAME, config["vocab_size"], settings)
    kept = {name: tensor for name, tensor in stacked(settings["order"]).items() if not name.startswith(settings["drop"])}
    add_tensors(writer, kept, quantization)
    close(writer)
    return path


def stacked(order: int) -> dict[str, Tensor]:
    """The tensors by the names of llama.cpp. order: -1 stacks the experts the other way round."""
    parts = {part: stem for stem, part in reader.EXPERTS.items()}
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for key, tensor in load_file(GOLDEN / NAME / "model.safetensors").items():
        own = llada_moe.NAMES.ours(key)
        assert own is not None
        if expert := re.fullmatch(r"blocks\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.weight", own):
            stacks.setdefault(f"blk.{expert[1]}.{parts[expert[3]]}.weight", {})[int(expert[2])] = tensor
            continue
        found[reader.EXPERT_NAMES.theirs(own)] = tensor
    return found | {name: torch.stack([stack[i] for i in sorted(stack)][::order]) for name, stack in stacks.items()}


def test_a_file_is_the_checkpoint_that_it_was_made_of(tmp_path: Path) -> None:
    numbers, base, lm = golden(NAME), load(str(GOLDEN / NAME)), load(str(write(tmp_path / "tiny.gguf")))
    assert apart(lm.logits(numbers["input_ids"]), numbers["logits"]) < NEAR
    held, expected = lm.network.state_dict(), base.network.state_dict()  # logits are equal up to where products begin in memory
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in held)
    assert (lm.config, lm.stops, lm.defaults) == (base.config, base.stops, base.defaults)
    text = "the worst <|mask|> and an ou 世界 1234\n\n🙂"
    assert lm.tokenizer.encode(text) == base.tokenizer.encode(text)
    assert lm.prompt_ids("the") == base.prompt_ids("the")


def test_the_order_of_the_experts_counts(tmp_path: Path) -> None:
    numbers = golden(NAME)
    assert apart(load(str(write(tmp_path / "tiny.gguf", order=-1))).logits(numbers["input_ids"]), numbers["logits"]) > 0.1


def test_a_mask_that_no_key_names_is_found_by_its_text(tmp_path: Path) -> None:
    assert load(str(write(tmp_path / "tiny.gguf", mask=None))).tokenizer.mask_id == 277


NATS = {"F16": 1e-3, "Q8_0": 0.01, "Q4_1": 0.15, "Q4_0": 0.25}  # mean KL from float32 weights


@pytest.mark.parametrize("quantization", NATS)
def test_quantized_files(quantization: str, tmp_path: Path) -> None:
    """The experts' down projections are too narrow for blocks of 32 weights here, and stay as they are."""
    numbers, path = golden(NAME), write(tmp_path / "tiny.gguf", quantization)
    lm = load(str(path))

    def nats(exact: Tensor, near: Tensor) -> float:
        exact_BTV, near_BTV = exact.log_softmax(-1), near.log_softmax(-1)
        return float((exact_BTV.exp() * (exact_BTV - near_BTV)).sum(-1).mean())

    held = lm.logits(numbers["input_ids"])
    assert 0 < nats(numbers["logits"], held) < NATS[quantization]
    for dtype, most in {"int8": 0.02, "int4": 0.2}.items():
        assert 0 < nats(held, load(str(path), dtype=dtype).logits(numbers["input_ids"])) < most


BAD: dict[str, dict[str, Any]] = {
    "has causal attention, which no llada-moe checkpoint has": {"causal": True},
    "expert_weights_norm = True, which no llada-moe checkpoint has": {"expert_weights_norm": True},
    "expert_gating_func = 2, which no llada-moe checkpoint has": {"expert_gating_func": SimpleNamespace(value=2)},
    "puts the mask at 280, where the tokenizer has no token": {"mask": 280},
    "lacks 'blk.0.ffn_gate_exps.weight'": {"drop": "blk.0.ffn_gate_exps"},
    "do not fit its config": {"drop": "blk.1.ffn_up_exps"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_files_get_one_line(message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load(str(write(tmp_path / "bad.gguf", **BAD[message])))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_cut_anywhere_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for keep in (24, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(InputError, match="is no whole GGUF file"):
            load(str(path))
