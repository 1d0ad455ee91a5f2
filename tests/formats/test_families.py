"""Checkpoints of other projects give the logits of their reference code; a wrong reading does not; bad ones get one line.

tests/golden: tiny random checkpoints in the layout of the real ones with what the reference computes from them (README.md in each).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlm.errors import InputError
from dlm.language_model import LanguageModel, load
from dlm.models.causal_text import AfterText
from dlm.models.pattern import reading
from dlm.models.shifted import Shifted
from dlm.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
NEAR = 3e-5  # of logits, whose spread is about 3: the right reading is 5e-6 off, the wrong norm eps 1e-4
LLAMA_SHAPED = ("llada", "dream", "a2d_qwen3", "a2d_qwen2")


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "golden.safetensors")


def edited(tmp_path: Path, name: str, *, file: str = "config.json", **changes: Any) -> Path:
    """A copy of a golden checkpoint with keys of a JSON file changed; None takes a key away."""
    directory = tmp_path / name
    shutil.copytree(GOLDEN / name, directory)
    data = json.loads((directory / file).read_text()) | changes
    (directory / file).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return directory


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("name", LLAMA_SHAPED)
def test_logits_are_those_of_the_reference(name: str) -> None:
    numbers = golden(name)
    assert apart(load(str(GOLDEN / name)).logits(numbers["input_ids"]), numbers["logits"]) < NEAR


@pytest.mark.parametrize("name", ["llada", "dream", "a2d_qwen3"])
def test_padded_logits(name: str) -> None:
    numbers = golden(name)
    real_BT = numbers["padded_attention_mask"]
    logits_BTV = load(str(GOLDEN / name)).logits(numbers["input_ids"], attention_mask=real_BT)
    assert apart(logits_BTV[real_BT.bool()], numbers["padded_logits"][real_BT.bool()]) < NEAR


def test_the_same_weights_block_by_block() -> None:
    numbers, lm = golden("a2d_qwen3"), load(str(GOLDEN / "a2d_qwen3"))
    logits_BTV = reading(lm.network, "block_causal", 4)(numbers["input_ids"])
    assert apart(logits_BTV, numbers["block_causal_4_logits"]) < NEAR
    assert apart(lm.logits(numbers["input_ids"]), numbers["block_causal_4_logits"]) > 1


def test_sdar_is_read_block_by_block_and_its_twin_causally() -> None:
    numbers, lm = golden("sdar"), load(str(GOLDEN / "sdar"))
    assert apart(lm.logits(numbers["input_ids"]), numbers["block_causal_4_logits"]) < NEAR
    assert apart(reading(lm.network, "causal")(numbers["input_ids"]), numbers["causal_logits"]) < NEAR
    assert apart(reading(lm.network, "full")(numbers["input_ids"]), numbers["block_causal_4_logits"]) > 1
    assert apart(reading(lm.network, "block_causal", 8)(numbers["input_ids"]), numbers["block_causal_4_logits"]) > 1


def test_nemotron_reads_text_causally_and_a_block_fully() -> None:
    numbers, lm = golden("nemotron_labs_diffusion"), load(str(GOLDEN / "nemotron_labs_diffusion"))
    z_BT, begin_B1 = numbers["input_ids"], torch.full((2, 1), 8)
    assert apart(lm.logits(z_BT), numbers["full_logits"]) < NEAR
    assert apart(reading(lm.network, "causal")(z_BT), numbers["causal_logits"]) < NEAR
    mixed_BTV = lm.network(z_BT, begin_B1=begin_B1, block_length=4)
    assert apart(mixed_BTV, numbers["causal_8_then_a_block_of_4_logits"]) < NEAR
    assert apart(lm.network(z_BT, begin_B1=begin_B1 - 1, block_length=5), numbers["causal_8_then_a_block_of_4_logits"]) > 1
    first_BTV = AfterText(lm.network)(z_BT, begin_B1=begin_B1)
    assert isinstance(lm.denoiser, AfterText)
    assert apart(first_BTV[:, 8], numbers["causal_logits"][:, 7]) < NEAR
    assert apart(first_BTV[:, 9:], numbers["causal_8_then_a_block_of_4_logits"][:, 9:]) < NEAR
    index_BC, at_BT = torch.tensor([[8, 10], [9, 11]]), torch.zeros(2, 12, dtype=torch.bool)
    picked_BCV = AfterText(lm.network)(z_BT, begin_B1=begin_B1, index_BC=index_BC)
    at_BT = at_BT.scatter(1, index_BC, value=True)
    asked_BTV = AfterText(lm.network)(z_BT, begin_B1=begin_B1, at_BQ=at_BT)
    for row, places in enumerate(index_BC.tolist()):
        assert apart(picked_BCV[row], first_BTV[row, places]) < NEAR
        assert apart(asked_BTV[row, places], first_BTV[row, places]) < NEAR


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 16384}
WRONG_NEMOTRON: dict[str, dict[str, Any]] = {
    "norm eps": {"rms_norm_eps": 1e-6},
    "plain rotary positions": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "another factor": {"rope_parameters": YARN | {"factor": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "scaled cosines": {"rope_parameters": YARN | {"factor": 0.25, "attention_factor": 1.1}},
}


@pytest.mark.parametrize("case", WRONG_NEMOTRON)
def test_a_wrong_reading_of_nemotron_is_told_from_the_right_one(case: str, tmp_path: Path) -> None:
    numbers = golden("nemotron_labs_diffusion")
    lm = load(str(edited(tmp_path, "nemotron_labs_diffusion", **WRONG_NEMOTRON[case])))
    assert apart(lm.logits(numbers["input_ids"]), numbers["full_logits"]) > NEAR


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "llada norm eps": ("llada", {"rms_norm_eps": 1e-6}),
    "llada rotary base": ("llada", {"rope_theta": 10_000.0}),
    "llada tied head": ("llada", {"weight_tying": True}),
    "dream norm eps": ("dream", {"rms_norm_eps": 1e-5}),
    "dream rotary base": ("dream", {"rope_theta": 10_000.0}),
    "a2d_qwen3 norm eps": ("a2d_qwen3", {"rms_norm_eps": 1e-5}),
    "a2d_qwen3 rotary base": ("a2d_qwen3", {"rope_theta": 500_000}),
    "a2d_qwen2 norm eps": ("a2d_qwen2", {"rms_norm_eps": 1e-5}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_reading_is_told_from_the_right_one(case: str, tmp_path: Path) -> None:
    name, changes = WRONG[case]
    directory = edited(tmp_path, name, **changes)
    if "tied" in case:  # a file that really has no other head
        state = load_file(directory / "model.safetensors")
        save_file({k: v for k, v in state.items() if "transformer.ff_out" not in k}, directory / "model.safetensors")
    numbers = golden(name)
    assert apart(load(str(directory)).logits(numbers["input_ids"]), numbers["logits"]) > NEAR


@pytest.mark.parametrize("name", LLAMA_SHAPED)
def test_a_causal_reading_is_told_from_the_right_one(name: str) -> None:
    numbers, lm = golden(name), load(str(GOLDEN / name))
    assert apart(reading(lm.network, "causal")(numbers["input_ids"]), numbers["logits"]) > 1


def test_the_head_of_the_file_counts_whatever_the_config_says() -> None:
    numbers, lm = golden("a2d_qwen2"), load(str(GOLDEN / "a2d_qwen2"))
    assert not lm.config.network.tied
    lm.network.head.weight = lm.network.embed.weight
    logits_BTV = lm.logits(numbers["input_ids"])
    assert apart(logits_BTV, numbers["logits_of_the_embedding_as_head"]) < NEAR
    assert apart(logits_BTV, numbers["logits"]) > 1


def test_a_head_that_repeats_the_embedding_is_tied(tmp_path: Path) -> None:
    directory = edited(tmp_path, "a2d_qwen3")
    state = load_file(directory / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, directory / "model.safetensors")
    assert load(str(directory)).config.network.tied


def test_what_is_sampled_from_is_shifted_and_what_is_shown_is_not() -> None:
    numbers, lm = golden("dream"), load(str(GOLDEN / "dream"))
    z_BT, t_B = numbers["input_ids"], torch.zeros(2)
    shifted_BTV = lm.predict(z_BT, t_B)
    assert apart(shifted_BTV, torch.cat([numbers["logits"][:, :1], numbers["logits"][:, :-1]], 1)) < NEAR
    assert apart(shifted_BTV, numbers["logits"]) > 1
    assert apart(load(str(GOLDEN / "llada")).predict(z_BT, t_B), golden("llada")["logits"]) > 1  # other ids: the test can fail


def test_a_shifted_network_is_asked_for_the_rows_before() -> None:
    lm = load(str(GOLDEN / "dream"))
    z_BT = golden("dream")["input_ids"]
    at_BT = torch.rand(z_BT.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    at_BT[0, 0], at_BT[1, 0] = True, False
    whole_BTV, asked_BTV = Shifted(lm.network)(z_BT), Shifted(lm.network)(z_BT, at_BQ=at_BT)
    assert apart(asked_BTV[at_BT], whole_BTV[at_BT]) < NEAR
    assert at_BT.any(-1).all()


MASKS = {"llada": 277, "dream": 276, "a2d_qwen3": 277, "a2d_qwen2": 277}
STOPS = {"llada": {273, 276}, "dream": {272, 274}, "a2d_qwen3": {272, 274}, "a2d_qwen2": {272, 274}}


@pytest.mark.parametrize("name", LLAMA_SHAPED)
def test_mask_and_stops(name: str) -> None:
    lm = load(str(GOLDEN / name))
    assert lm.tokenizer.mask_id == lm.config.mask_token_id == MASKS[name]
    assert lm.stops == STOPS[name]
    assert lm.is_diffusion


@pytest.mark.parametrize("name", LLAMA_SHAPED)
def test_neither_mask_nor_padding_of_the_vocabulary_is_drawn(name: str) -> None:
    lm = load(str(GOLDEN / name))
    z_BT = torch.full((1, 4), lm.tokenizer.mask_id)
    logp_BTV = lm.noise.log_probs(torch.zeros(1, 4, 288), z_BT, torch.ones(1))
    last = {"llada": 277, "dream": 276}.get(name, 277)  # the tokenizer's last token, which is the mask
    assert bool((logp_BTV[..., last:] == -torch.inf).all())
    assert bool((logp_BTV[..., :last] > -torch.inf).all())


@pytest.mark.parametrize("name", LLAMA_SHAPED)
def test_text_there_and_back(name: str) -> None:
    lm = load(str(GOLDEN / name))
    text = "the worst <|mask|> <|mdm_mask|> and an ou 世界 🙂"
    ids = lm.tokenizer.encode(text)
    assert lm.tokenizer.decode(ids) == text
    assert lm.tokenizer.mask_id not in ids
    assert lm.tokenizer.mask_id not in lm.tokenizer.pieces()


def test_vocab_and_merges_cut_as_qwen2_does() -> None:
    """Dream has no tokenizer.json; the vocabulary, merges and words are those of the a2d directory, which has one."""
    text = "the sun's on the nd\n\n  1234 thethe"
    assert load(str(GOLDEN / "dream")).tokenizer.encode(text) == Tokenizer.load(GOLDEN / "a2d_qwen2").encode(text)


@pytest.mark.parametrize("name", LLAMA_SHAPED)
def test_saved_in_our_own_form(name: str, tmp_path: Path) -> None:
    lm, numbers = load(str(GOLDEN / name)), golden(name)
    lm.save_pretrained(tmp_path / name)
    again = load(str(tmp_path / name))
    assert again.config == lm.config
    assert again.defaults == lm.defaults
    assert again.chat == lm.chat
    assert (again.tokenizer.vocab_size, again.tokenizer.mask_id) == (lm.tokenizer.vocab_size, lm.tokenizer.mask_id)
    assert torch.equal(again.logits(numbers["input_ids"]), lm.logits(numbers["input_ids"]))
    assert torch.equal(again.predict(numbers["input_ids"], torch.zeros(2)), lm.predict(numbers["input_ids"], torch.zeros(2)))


def test_a_conversation() -> None:
    canvas = load(str(GOLDEN / "llada")).chat_canvas([{"role": "user", "content": "the"}], max_new_tokens=4)
    ids = canvas.tokens_BT[0].tolist()
    assert ids[:2] == [272, 274]  # <|startoftext|><|start_header_id|>
    assert 257 in ids


def _shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensor(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    save_file(state | {"model.vision.weight": torch.zeros(2)}, directory / "model.safetensors")


def _no_merges(directory: Path) -> None:
    (directory / "merges.txt").unlink()


def _gap(directory: Path) -> None:
    for file in ("added_tokens.json", "tokenizer_config.json"):
        data = json.loads((directory / file).read_text())
        data.pop("<|im_start|>", None)
        data.get("added_tokens_decoder", {}).pop("273", None)
        (directory / file).write_text(json.dumps(data))


def _no_mask(directory: Path) -> None:
    data = json.loads((directory / "tokenizer.json").read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<|mask|>"]
    (directory / "tokenizer.json").write_text(json.dumps(data))


Spoil = Callable[[Path], None]
BAD: dict[str, tuple[str, dict[str, Any], Spoil | None, str]] = {
    "another paradigm": ("nemotron_labs_diffusion", {"dlm_paradigm": "autoregressive"}, None, "dlm_paradigm = 'autoregressive'"),
    "queries scaled by position": ("nemotron_labs_diffusion", {"max_position_embeddings": 32768}, None, "beyond the original window"),
    "rotary positions of another kind": ("nemotron_labs_diffusion", {"rope_parameters": {"rope_type": "mrope"}}, None, "'mrope'"),
    "another class of the same model_type": ("dream", {"architectures": ["DreamForCausalLM"]}, None, "Known: LLaDAModelLM, DreamModel"),
    "code demanded": ("llada", {"architectures": ["Novel"]}, None, "demands code of its own (auto_map), which dlm never runs"),
    "unknown, without code": ("a2d_qwen3", {"architectures": ["Novel"]}, None, "kind 'a2d-qwen3' (Novel), which dlm does not read. Known"),
    "bitsandbytes": ("llada", {"quantization_config": {"quant_method": "bitsandbytes"}}, None, "quantized by bitsandbytes"),
    "awq": ("dream", {"quantization_config": {"quant_method": "awq"}}, None, "quantized by awq, which dlm does not read"),
    "gptq": ("a2d_qwen2", {"quantization_config": {"quant_method": "gptq"}}, None, "quantized by gptq"),
    "a shard missing": ("llada", {}, _shard, "lacks model-00002-of-00002.safetensors"),
    "a tensor too many": ("dream", {}, _tensor, "a tensor model.vision.weight, which no dream model has"),
    "no tokenizer": ("dream", {}, _no_merges, "neither tokenizer.json nor merges.txt"),
    "an added token missing": ("dream", {}, _gap, "tokens before it are missing"),
    "no mask in the tokenizer": ("a2d_qwen3", {}, _no_mask, "its tokenizer lacks the mask token <|mask|>"),
    "a mask beyond the tokenizer": ("llada", {"mask_token_id": 280}, None, "puts the mask at 280, where the tokenizer has no token"),
    "alibi": ("llada", {"alibi": True}, None, "alibi = True is not supported"),
    "a key missing": ("llada", {"rope_theta": None}, None, "lacks 'rope_theta'"),
    "fewer layers": ("a2d_qwen3", {"num_hidden_layers": 3, "layer_types": None}, None, "it says that there are 3 layers, they have 2"),
    "another size": ("a2d_qwen2", {"hidden_size": 64}, None, "do not fit its config.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_get_one_line(case: str, tmp_path: Path) -> None:
    name, changes, spoil, message = BAD[case]
    directory = edited(tmp_path, name)
    data = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    if spoil is not None:
        spoil(directory)
    with pytest.raises(InputError) as error:
        load(str(directory))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    directory = edited(tmp_path, "llada")
    (directory / "modeling_llada.py").write_text("raise SystemExit('executed')")
    (directory / "configuration_llada.py").write_text("raise SystemExit('executed')")
    assert isinstance(load(str(directory)), LanguageModel)


def test_a_prompt_cannot_hold_the_mask(tmp_path: Path) -> None:
    """A tokenizer that does not mark its mask as a control token would read it out of a text."""
    directory = edited(tmp_path, "llada")
    data = json.loads((directory / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] &= token["content"] != "<|mdm_mask|>"
    (directory / "tokenizer.json").write_text(json.dumps(data))
    lm = load(str(directory))
    with pytest.raises(InputError, match="spells the mask"):
        lm.canvas("fill <|mdm_mask|> in")
    with pytest.raises(InputError, match="the token 277 is none"):
        lm.canvas([[1, 277]])
