"""LLaDA-MoE and LLaDA2 give the logits of their reference code; a wrong reading does not; bad checkpoints get one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import Dlm
from dlm.errors import InputError
from dlm.language_model import LanguageModel, load
from dlm.models.pattern import reading
from dlm.models.transformer import Transformer
from dlm.workflows.verify import verify
from formats.test_families import GOLDEN, NEAR, apart, edited, golden

FAMILIES = ("llada_moe", "llada2_moe")


@cache
def model(name: str, dtype: str = "float32") -> LanguageModel:
    return load(str(GOLDEN / name), dtype=dtype)


def expected(name: str) -> Tensor:
    return golden(name)["logits" if name == "llada_moe" else "full_logits"]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_reference(name: str) -> None:
    """A text of LLaDA2 within its first block is read fully."""
    assert apart(model(name).logits(golden(name)["input_ids"]), expected(name)) < NEAR


def test_padded_logits() -> None:
    numbers = golden("llada_moe")
    real_BT = numbers["padded_attention_mask"]
    logits_BTV = model("llada_moe").logits(numbers["input_ids"], attention_mask=real_BT)
    assert apart(logits_BTV[real_BT.bool()], numbers["padded_logits"][real_BT.bool()]) < NEAR


def test_llada2_is_read_block_by_block() -> None:
    numbers, lm = golden("llada2_moe"), model("llada2_moe")
    found = reading(lm.network, "block_causal", 4)(numbers["input_ids"])
    assert apart(found, numbers["block_causal_4_logits"]) < NEAR
    assert apart(reading(lm.network, "block_causal", 8)(numbers["input_ids"]), numbers["block_causal_4_logits"]) > 1
    assert (lm.config.network.attention, lm.config.network.block_length, lm.config.block_phase) == ("block_causal", 32, "zero")


def test_padding_of_llada2_is_not_read() -> None:
    """A row beside padding gives what it gives alone."""
    ids_BT = golden("llada2_moe")["input_ids"]
    real_BT = torch.arange(16) >= torch.tensor([[3], [0]])
    found = model("llada2_moe").logits(ids_BT, attention_mask=real_BT)
    assert apart(found[0, 3:], model("llada2_moe").logits(ids_BT[:1, 3:])[0]) < NEAR


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "moe: norm eps": ("llada_moe", {"rms_norm_eps": 1e-6}),
    "moe: rotary base": ("llada_moe", {"rope_theta": 10_000}),
    "moe: experts of a token": ("llada_moe", {"num_experts_per_tok": 3}),
    "llada2: norm eps": ("llada2_moe", {"rms_norm_eps": 1e-5}),
    "llada2: rotary base": ("llada2_moe", {"rope_theta": 10_000}),
    "llada2: rotary share": ("llada2_moe", {"partial_rotary_factor": 1.0, "rotary_dim": 16}),
    "llada2: scaling": ("llada2_moe", {"routed_scaling_factor": 1.0}),
    "llada2: groups": ("llada2_moe", {"n_group": 1, "topk_group": 1}),
    "llada2: groups of a token": ("llada2_moe", {"topk_group": 1}),
    "llada2: experts of a token": ("llada2_moe", {"num_experts_per_tok": 4}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_reading_is_told_from_the_right_one(case: str, tmp_path: Path) -> None:
    name, changes = WRONG[case]
    found = load(str(edited(tmp_path, name, **changes))).logits(golden(name)["input_ids"])
    assert apart(found, expected(name)) > NEAR


EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "moe: normalised weights": ("llada_moe", {"normalised": True}),
    "moe: sigmoid": ("llada_moe", {"score": "sigmoid"}),
    "llada2: weights as they are": ("llada2_moe", {"normalised": False}),
    "llada2: softmax": ("llada2_moe", {"score": "softmax"}),
    "llada2: no shared expert": ("llada2_moe", {"shared_width": 0}),
    "llada2: no correction": ("llada2_moe", {"correction": False}),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_another_router_is_told_from_the_right_one(case: str) -> None:
    name, changes = EXPERTS[case]
    found = with_shape(name, experts=changes)(golden(name)["input_ids"])
    assert apart(found, expected(name)) > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_the_norm_of_queries_and_keys_counts(name: str) -> None:
    assert apart(with_shape(name, qk_norm=False)(golden(name)["input_ids"]), expected(name)) > 0.1


def with_shape(name: str, *, experts: dict[str, Any] | None = None, **changes: Any) -> Transformer:
    """The same weights in a network of a config that differs."""
    shape = model(name).config.network
    of_experts = shape.to_dict()["experts"] | (experts or {})
    made = Transformer(shape.with_(experts=of_experts, **changes)).eval().requires_grad_(False)
    made.load_state_dict(model(name).network.state_dict(), strict=False)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_a_causal_reading_is_told_from_the_right_one(name: str) -> None:
    assert apart(reading(model(name).network, "causal")(golden(name)["input_ids"]), expected(name)) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_mask_stops_and_chat(name: str) -> None:
    lm = model(name)
    assert lm.tokenizer.mask_id == lm.config.mask_token_id == 277
    assert lm.stops == {lm.tokenizer.control["<|endoftext|>"], lm.tokenizer.control["<|role_end|>"]}
    canvas = lm.chat_canvas([{"role": "user", "content": "the"}], max_new_tokens=4)
    assert lm.tokenizer.control["<|role_end|>"] in canvas.tokens_BT[0].tolist()
    assert lm.default_sampler == {"llada_moe": "llada", "llada2_moe": "llada2"}[name]


def test_llada_moe_writes_what_a_plain_loop_writes(tmp_path: Path) -> None:
    """The reference has no golden ids: LLaDA's `generate`, two steps for a block of four, one row."""
    lm, prompt = model("llada_moe"), [78, 156, 254, 181, 134]
    ids_T = torch.tensor([*prompt, *[277] * 16])
    for begin in range(5, 21, 4):
        for _ in range(2):
            logits_TV = lm.logits(ids_T[None])[0].clone()
            logits_TV[:, 277:] = -torch.inf  # no text has them
            p_T, token_T = logits_TV.softmax(-1).max(-1)
            open_T = (ids_T == 277) & (torch.arange(21) < begin + 4)
            best = sorted(open_T.nonzero().flatten().tolist(), key=lambda i: -float(p_T[i]))[:2]
            ids_T[best] = token_T[best]
    (found,) = lm.generate([prompt], max_new_tokens=16, steps=8, block_length=4)
    assert found.sampler == "llada"
    kept = found.trajectory.current_BT[0].tolist()
    written = kept[: kept.index(277)] if 277 in kept else kept  # nothing is written after a stop
    assert written == ids_T[: len(written)].tolist()
    assert len(written) > 8


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_in_our_own_form(name: str, tmp_path: Path) -> None:
    lm, ids_BT = model(name), golden(name)["input_ids"]
    lm.save_pretrained(tmp_path / name)
    again = load(str(tmp_path / name))
    assert (again.config, again.defaults) == (lm.config, lm.defaults)
    assert torch.equal(again.logits(ids_BT), lm.logits(ids_BT))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_bits_are_near(name: str, dtype: str) -> None:
    """In mean KL for each token; the router stays as it is, since a near-tie in it changes which experts are run."""
    ids_BT, lm = golden(name)["input_ids"], model(name, dtype)
    exact_BTV, near_BTV = (one.logits(ids_BT).log_softmax(-1) for one in (model(name), lm))
    nats = float((exact_BTV.exp() * (exact_BTV - near_BTV)).sum(-1).mean())
    assert 0 < nats < {"bfloat16": 0.02, "int8": 0.02, "int4": 0.4}[dtype]
    assert lm.network.quantized == (dtype != "bfloat16")
    router = "blocks.1.mlp.router.weight"
    assert torch.equal(lm.network.get_parameter(router), model(name).network.get_parameter(router))
    kinds = {p.dtype for key, p in lm.network.named_parameters() if ".experts." in key}
    assert kinds == ({torch.bfloat16} if dtype == "bfloat16" else set())


@pytest.mark.parametrize("name", FAMILIES)
def test_from_the_command_line(dlm: Dlm, name: str, tmp_path: Path) -> None:
    code, out, _ = dlm("generate", "the", str(GOLDEN / name), "--max-new-tokens", "8", "--json")
    assert code == 0
    assert "text" in out
    (tmp_path / "text.txt").write_text("the worst and an ou in the sun\n" * 20)
    what = ("--data", str(tmp_path / "text.txt"), "--split", "all", "--passes", "2", "--card", str(tmp_path / "card.json"))
    code, out, _ = dlm("eval", str(GOLDEN / name), *what)
    assert code == 0
    assert {"llada_moe": "any-order", "llada2_moe": "blocks of 32"}[name] in out


def test_without_a_tokenizer_a_text_is_ids_and_the_cases_name_the_mask(tmp_path: Path) -> None:
    for name in FAMILIES:
        directory = edited(tmp_path, name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (directory / file).unlink()
        lm = load(str(directory))
        assert apart(lm.logits(golden(name)["input_ids"]), expected(name)) < NEAR
        assert lm.tokenizer.encode("17 3 99") == [17, 3, 99]
    cases = GOLDEN / "llada2_moe" / "generations.json"
    assert verify(lm, cases).record() == {"cases": 4, "equal": 4, "differ": []}
    other = json.loads(cases.read_text()) | {"mask_id": 276}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert verify(lm, tmp_path / "other.json").differ
    with pytest.raises(InputError, match="written with the mask 276, that of llada2_moe is 277"):
        verify(model("llada2_moe"), tmp_path / "other.json")


def _without(ending: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        save_file({key: value for key, value in state.items() if not key.endswith(ending)}, directory / "model.safetensors")

    return spoil


def _tenth_expert(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    save_file(state | {"model.layers.1.mlp.experts.10.mid_proj.weight": torch.zeros(2)}, directory / "model.safetensors")


BAD: dict[str, tuple[str, dict[str, Any], Callable[[Path], None] | None, str]] = {
    "a layer without experts": ("llada_moe", {"moe_layer_freq": [0, 1]}, None, "moe_layer_freq = [0, 1] is not supported"),
    "a shared expert": ("llada_moe", {"shared_expert_intermediate_size": 8}, None, "shared_expert_intermediate_size = 8 is not"),
    "groups": ("llada_moe", {"router_num_group": 4}, None, "router_num_group = 4 is not supported"),
    "partly rotated": ("llada_moe", {"partial_rotary_factor": 0.5}, None, "partial_rotary_factor = 0.5 is not supported"),
    "an expert missing": ("llada_moe", {}, _without("experts.3.up_proj.weight"), "do not fit its config.json"),
    "a strange tensor of an expert": ("llada_moe", {}, _tenth_expert, "which no llada-moe model has"),
    "another number of experts": ("llada_moe", {"num_experts": 4}, None, "do not fit its config.json"),
    "a rotary share that two keys tell": ("llada2_moe", {"rotary_dim": 16}, None, "rotary_dim = 16 is not supported (only 8"),
    "YaRN": ("llada2_moe", {"rope_scaling": {"type": "yarn"}}, None, "rope_scaling = {'type': 'yarn'} is not supported"),
    "softmax": ("llada2_moe", {"score_function": "softmax"}, None, "score_function = 'softmax' is not supported"),
    "a sliding window": ("llada2_moe", {"use_sliding_window": True}, None, "use_sliding_window = True is not supported"),
    "groups that do not divide": ("llada2_moe", {"n_group": 3}, None, "16 experts of width 8 in 3 groups cannot be"),
    "no output of attention": ("llada2_moe", {}, _without("attention.dense.weight"), "do not fit together"),
    "no bias of experts": ("llada2_moe", {}, _without("expert_bias"), "do not fit its config.json"),
    "a key missing": ("llada2_moe", {"n_group": None}, None, "lacks 'n_group'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_get_one_line(case: str, tmp_path: Path) -> None:
    name, changes, spoil, message = BAD[case]
    directory = edited(tmp_path, name, **changes)
    if spoil is not None:
        spoil(directory)
    with pytest.raises(InputError) as error:
        load(str(directory))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
