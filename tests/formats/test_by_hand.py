"""Families that a plain config does not name are read as they are told to; those that build on Qwen2.5 read block by block.

The weights are those of golden checkpoints under other configs, and the oracle is transformers with the mask of the family.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bases import publish, transformer
from dlm.errors import InputError
from dlm.language_model import load, official
from dlm.language_model.options import DecodingOptions
from dlm.models.pattern import reading
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas
from dlm.workflows.verify import Verified, verify

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
        lm.canvas(str(lm.tokenizer.inner.id_to_token(11)))
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


def plain_fast_dllm(prompt: list[int], blocks: int, size: int, small: int, threshold: float, stop: int = -1) -> tuple[list[int], int]:
    """Fast-dLLM v2's `generate` over transformers' network, without caches: the ids that it returns, and its forward passes that write."""
    mask_id, passes = 277, 0

    def rows(ids: list[int]) -> Tensor:
        nonlocal passes
        passes += 1
        logits_TV = logits_of(oracle(), torch.tensor([ids]), by_blocks(len(ids), size))[0]
        logits_TV[:, mask_id:] = -torch.inf
        return logits_TV

    def ended(ids: list[int]) -> bool:
        new = ids[len(prompt) :]
        return stop in new and mask_id not in new[: new.index(stop)]

    ids = [*prompt, int(rows(prompt)[-1].argmax())] if len(prompt) % size == 0 else [*prompt]
    for _ in range(blocks):
        ids += [mask_id] * (size - len(ids) % size)
        begin = len(ids) - size
        for start in range(begin, begin + size, small):
            while mask_id in ids[start : start + small] and not ended(ids):
                logits_TV = rows(ids)
                shifted_TV = torch.cat([logits_TV[:1], logits_TV[:-1]])
                sure_N, token_N = shifted_TV[start : start + small].softmax(-1).max(-1)
                due_N = torch.tensor([token == mask_id for token in ids[start : start + small]])
                sure_N = sure_N.masked_fill(~due_N, -1.0)
                for place in {int(sure_N.argmax()), *(sure_N > threshold).nonzero().flatten().tolist()}:
                    ids[start + place] = int(token_N[place])
        if ended(ids):
            break
        ids.append(int(rows(ids)[-1].argmax()))
    new = ids[len(prompt) :]
    return [*prompt, *(new[: new.index(stop) + 1] if stop in new else new)], passes


@pytest.mark.parametrize("prompt", [[5, 9, 100, 27, 3], [5, 9, 100, 27], [7]], ids=["in a block", "whole blocks", "one token"])
@pytest.mark.parametrize(("size", "small", "threshold"), [(4, 4, 1.0), (8, 4, 0.3), (8, 2, 0.9)])
def test_fast_dllm_against_a_plain_loop(tmp_path: Path, prompt: list[int], size: int, small: int, threshold: float) -> None:
    lm = load(str(fast_dllm(tmp_path, size)))
    settings = {"max_new_tokens": 3 * size, "block_size": size, "small_block_size": small, "threshold": threshold, "stop_token": 287}
    expected, passes = plain_fast_dllm(prompt, 3, size, small, threshold)
    plan = official.plan(lm, settings)
    canvas = Canvas.from_rows([[*prompt, *[None] * plan.room(len(prompt))]], fill=lm.tokenizer.mask_id)
    *_, last = plan.sampler.steps(canvas, rng=generators(0, 1))
    assert last.tokens_BT[0].tolist() == expected
    assert last.forwards == passes
    stop = expected[len(prompt) + size + 1]  # in the second block
    cases = {"cases": [{"name": "stops", "settings": settings | {"stop_token": stop}, "prompt_ids": [prompt]}]}
    cases["cases"][0]["output_ids"] = [plain_fast_dllm(prompt, 3, size, small, threshold, stop)[0]]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (found,) = verify(lm, tmp_path / "cases.json").cases
    assert found.equal
    assert isinstance(found, Verified)
    assert found.forwards == plain_fast_dllm(prompt, 3, size, small, threshold, stop)[1]


def test_fast_dllm_writes_what_a_plain_loop_writes(tmp_path: Path) -> None:
    test_fast_dllm_against_a_plain_loop(tmp_path, [5, 9, 100, 27, 3], 8, 4, 0.3)
    lm = load(str(tmp_path / "model"))
    settings: dict[str, Any] = {"sampler": "fast-dllm:0.3:4", "max_new_tokens": 12, "temperature": 0.0}
    (generation,) = lm.generate([[5, 9, 100, 27, 3]], **settings)
    expected, _ = plain_fast_dllm([5, 9, 100, 27, 3], 2, 8, 4, 0.3)
    ids = [token for token in generation.trajectory.current_BT[0].tolist() if token != lm.tokenizer.mask_id]
    assert expected[: len(ids)] == ids


def plain_p2(prompt: list[int], new: int, steps: int) -> tuple[list[int], int]:
    """Open-dLLM's `p2` at temperature 0 over transformers' network read fully: ids and forward passes."""
    mask_id, passes, ids = 277, 0, torch.tensor([*prompt, *[277] * new])
    fixed_T = ids != mask_id
    for i in range(steps):
        masked_T = ids == mask_id
        if not bool(masked_T.any()):
            break
        logits_TV = logits_of(oracle(), ids[None], torch.ones(len(ids), len(ids), dtype=torch.bool))[0]
        logits_TV[:, mask_id:] = -torch.inf
        sure_T, token_T = torch.cat([logits_TV[:1], logits_TV[:-1]]).softmax(-1).max(-1)
        passes += 1
        least = sure_T.masked_fill(fixed_T, torch.inf).argsort()[: int(torch.tensor(float(new)) * (1 - (i + 1) / steps))]
        again_T = torch.zeros_like(masked_T).index_fill(0, least, True)
        ids = torch.where(again_T, mask_id, torch.where(masked_T, token_T, ids))
    return ids.tolist(), passes


@pytest.mark.parametrize("steps", [3, 7, 16, 24])
def test_p2_against_a_plain_loop(tmp_path: Path, steps: int) -> None:
    lm, prompt = load(str(qwen2(tmp_path)), family="open-dcoder"), [5, 9, 100, 27, 3]
    expected, passes = plain_p2(prompt, 16, steps)
    case = {"name": "p2", "settings": {"alg": "p2", "steps": steps, "max_new_tokens": 16}, "prompt_ids": [prompt], "output_ids": [expected]}
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [case], "eos_id": 287}))
    lm.defaults["eos_token_id"] = []
    (found,) = verify(lm, tmp_path / "cases.json").cases
    assert found.equal
    assert isinstance(found, Verified)
    assert found.forwards == passes


def test_p2_writes_what_a_plain_loop_writes(tmp_path: Path) -> None:
    """A token that was written is masked again in some step; the reference's settings are those of the preset."""
    test_p2_against_a_plain_loop(tmp_path, 7)
    lm, prompt = load(str(tmp_path / "model"), family="open-dcoder"), [5, 9, 100, 27, 3]
    lm.defaults["eos_token_id"] = []
    (generation,) = lm.generate([prompt], steps=16, temperature=0.0, max_new_tokens=16, preset="official")
    assert generation.trajectory.current_BT[0].tolist() == plain_p2(prompt, 16, 16)[0]
    seen = [frame.tokens_BT[0].tolist() for frame in lm.stream([prompt], steps=16, temperature=0.0, max_new_tokens=16)]
    again = [place for one, other in pairwise(seen) for place in range(21) if one[place] != 277 == other[place]]
    assert again
    plan = lm.resolve(DecodingOptions())
    assert (plan.word, plan.steps, plan.draw.temperature, plan.draw.top_k) == ("p2", 128, 0.5, 200)
