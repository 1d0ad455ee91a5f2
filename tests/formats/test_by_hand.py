"""Families that a plain config does not name are read as they are told to; those that build on Qwen2.5 read block by block.

The weights are those of golden checkpoints under other configs, and the oracle is transformers with the mask of the family.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bases import publish, transformer
from dlm.errors import InputError
from dlm.language_model import load
from dlm.models.pattern import reading

GOLDEN = Path(__file__).parents[1] / "golden"
NEAR = 3e-5
Z_BT = torch.randint(0, 272, (2, 12), generator=torch.Generator().manual_seed(3))


def under(tmp_path: Path, name: str, **changes: Any) -> Path:
    """A golden checkpoint with another config."""
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / name, directory)
    data = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return directory


def qwen2(tmp_path: Path) -> Path:
    """As Open-dCoder publishes: nothing tells it from an autoregressive Qwen2."""
    return under(tmp_path, "a2d_qwen2", model_type="qwen2", architectures=["Qwen2ForCausalLM"])


def fast_dllm(tmp_path: Path, size: int = 4) -> Path:
    changes = {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": size}
    return under(tmp_path, "a2d_qwen2", **changes)


@cache
def oracle() -> Any:
    """transformers' Qwen2 with the weights of the golden checkpoint."""
    import transformers

    data = json.loads((GOLDEN / "a2d_qwen2" / "config.json").read_text()) | {"model_type": "qwen2", "tie_word_embeddings": False}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**data))
    model.load_state_dict(load_file(GOLDEN / "a2d_qwen2" / "model.safetensors"))
    return model.eval()


def logits_of(model: Any, z_BT: Tensor, reads_TT: Tensor) -> Tensor:
    """transformers' logits with a mask of its own, True where a row reads a column."""
    bias = torch.zeros(reads_TT.shape).masked_fill(~reads_TT, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits: Tensor = model(z_BT, attention_mask=bias.expand(len(z_BT), 1, *bias.shape)).logits
    return logits


def by_blocks(length: int, size: int) -> Tensor:
    number_T = torch.arange(length) // size
    return number_T[None] <= number_T[:, None]


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def test_open_dcoder_is_read_fully_and_shifted(tmp_path: Path) -> None:
    directory = qwen2(tmp_path)
    numbers = load_file(GOLDEN / "a2d_qwen2" / "golden.safetensors")
    lm = load(str(directory), family="open-dcoder")
    assert lm.is_diffusion
    assert lm.config.family == "open-dcoder"
    assert lm.tokenizer.mask_id == 277
    assert apart(lm.logits(numbers["input_ids"]), numbers["logits"]) < NEAR
    shifted_BTV = lm.predict(numbers["input_ids"], torch.zeros(2))
    assert apart(shifted_BTV[:, 1:], numbers["logits"][:, :-1]) < NEAR
    plain = load(str(directory))
    assert not plain.is_diffusion
    assert apart(plain.logits(numbers["input_ids"]), numbers["logits"]) > 1


def test_diffullama_is_read_fully_shifted_and_its_mask_is_a_token(tmp_path: Path) -> None:
    model = transformer("Llama")
    directory = publish(model, tmp_path / "llama")
    data = json.loads((directory / "config.json").read_text()) | {"mask_token_id": 11}
    (directory / "config.json").write_text(json.dumps(data))
    lm, z_BT = load(str(directory), family="diffullama"), Z_BT % 80
    expected_BTV = logits_of(model, z_BT, torch.ones(12, 12, dtype=torch.bool))
    assert apart(lm.logits(z_BT), expected_BTV) < NEAR
    assert apart(lm.predict(z_BT, torch.zeros(2))[:, 1:], expected_BTV[:, :-1]) < NEAR
    assert lm.tokenizer.mask_id == 11
    with pytest.raises(InputError, match="spells the mask"):
        lm.canvas(lm.tokenizer.piece(11))
    generation = lm.generate([[1, 2, 3]], max_new_tokens=8, steps=4)[0]
    assert generation.sampler == "ancestral"
    assert generation.forwards <= 4


def test_i_dlm_is_sdar_read_causally(tmp_path: Path) -> None:
    numbers = load_file(GOLDEN / "sdar" / "golden.safetensors")
    lm = load(str(GOLDEN / "sdar"), family="i-dlm")
    assert apart(lm.logits(numbers["input_ids"]), numbers["causal_logits"]) < NEAR
    assert apart(load(str(GOLDEN / "sdar")).logits(numbers["input_ids"]), numbers["causal_logits"]) > 1
    assert not lm.is_diffusion
    prompt = [[273, 163, 148, 257]]
    (strided,) = lm.generate(prompt, max_new_tokens=24, temperature=0.0)
    (plain,) = lm.generate(prompt, max_new_tokens=24, temperature=0.0, sampler="autoregressive")
    assert strided.sampler == "strided:4"
    assert strided.trajectory.current_BT.tolist() == plain.trajectory.current_BT.tolist()
    assert lm.tokenizer.mask_id not in strided.trajectory.current_BT[0].tolist()
    lm.save_pretrained(tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    assert again.default_sampler == "strided:4"
    assert torch.equal(again.logits(numbers["input_ids"]), lm.logits(numbers["input_ids"]))


def test_fast_dllm_is_read_block_by_block_and_shifted(tmp_path: Path) -> None:
    lm, size = load(str(fast_dllm(tmp_path))), 4
    expected_BTV = logits_of(oracle(), Z_BT, by_blocks(12, size))
    assert apart(lm.logits(Z_BT), expected_BTV) < NEAR
    assert apart(lm.predict(Z_BT, torch.zeros(2))[:, 1:], expected_BTV[:, :-1]) < NEAR
    assert apart(reading(lm.network, "block_causal", 8)(Z_BT), expected_BTV) > 1
    assert apart(reading(lm.network, "full")(Z_BT), expected_BTV) > 1
    assert lm.config.block_phase == "zero"


def test_blocks_beside_clean_text_predict_as_each_block_alone(tmp_path: Path) -> None:
    """The bound reads all blocks in one forward pass; the sampler reads one after the text before it."""
    for lm in (load(str(fast_dllm(tmp_path))), load(str(GOLDEN / "nemotron_labs_diffusion"))):
        z_BT = torch.where(torch.rand(Z_BT.shape, generator=torch.Generator().manual_seed(0)) < 0.6, lm.tokenizer.mask_id, Z_BT)
        beside_BTV = lm.predict_beside(z_BT, Z_BT, 4)
        for begin in (0, 4, 8):
            text_BT = torch.cat([Z_BT[:, :begin], z_BT[:, begin : begin + 4]], 1)
            sampler = lm.sampler(sampler="topk", block_length=4, steps=12)
            how = {"begin_B1": torch.full((2, 1), begin)} if "nemotron" in lm.name else {}
            alone_BTV = sampler.denoiser(text_BT, torch.zeros(2), **how)  # type: ignore[attr-defined]
            assert apart(beside_BTV[:, begin : begin + 4], alone_BTV[:, begin:]) < NEAR
        assert apart(lm.predict_beside(z_BT, z_BT, 4), beside_BTV) > 1


WRONG: list[tuple[str, str, str]] = [
    ("a2d_qwen2", "open-dcodr", "no family 'open-dcodr'; did you mean open-dcoder?; known: llada, dream"),
    ("a2d_qwen2", "llada", "lacks 'max_sequence_length'"),
    ("a2d_qwen2", "fast-dllm-v2", "lacks 'bd_size'"),
]


@pytest.mark.parametrize(("name", "family", "message"), WRONG)
def test_a_wrong_family_gets_one_line(name: str, family: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load(str(GOLDEN / name), family=family)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_ours_says_its_family_itself() -> None:
    with pytest.raises(InputError, match="a checkpoint of dlm's own"):
        load("shakespeare-mask", family="dream")


def test_weights_that_the_family_has_no_place_for(tmp_path: Path) -> None:
    """Qwen3 read as Open-dCoder: its norms of queries and keys have no place."""
    directory = under(tmp_path, "a2d_qwen3", model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    with pytest.raises(InputError, match="do not fit its config"):
        load(str(directory), family="open-dcoder")


def test_a_mask_by_its_number(tmp_path: Path) -> None:
    directory = qwen2(tmp_path)
    data = json.loads((directory / "tokenizer.json").read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<|mask|>"]
    (directory / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"lacks the mask token .* or the id 151665"):
        load(str(directory), family="open-dcoder")


def test_a_checkpoint_without_tokenizer_reads_token_ids() -> None:
    lm = load(str(GOLDEN / "nemotron_labs_diffusion"))
    assert lm.tokenizer.encode("17 3 99") == [17, 3, 99]
    assert lm.tokenizer.encode(lm.tokenizer.decode([17, 3, 99])) == [17, 3, 99]
    assert lm.decode(next(iter(lm.stream("17 3", max_new_tokens=1)))).startswith("17 3 ")
    with pytest.raises(InputError, match="no tokenizer, so its text is token ids such as 17 3 99, and 'the' is none of them"):
        lm.canvas("the 17")
    with pytest.raises(InputError, match="the text spells the mask"):
        lm.canvas("277")


def test_sentencepiece_alone_is_not_read(tmp_path: Path) -> None:
    directory = under(tmp_path, "nemotron_labs_diffusion")
    (directory / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"put the tokenizer\.json of the model beside it"):
        load(str(directory))
