"""The reference samplers: every golden generation at temperature 0 gives the same ids, forward pass by forward pass."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dlm.errors import InputError
from dlm.language_model import LanguageModel, load, official
from dlm.language_model.options import TextKeywords
from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas, Frame

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("llada", "dream", "a2d_qwen3", "a2d_qwen2")
ALL = (*FAMILIES, "sdar", "nemotron_labs_diffusion")


@cache
def model(family: str) -> LanguageModel:
    return load(str(GOLDEN / family))


def cases(family: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GOLDEN / family / "generations.json").read_text())["cases"]
    return found


CASES = [pytest.param(family, case, id=f"{family}: {case['name']}") for family in ALL for case in cases(family)]


def prompts(case: dict[str, Any]) -> list[list[int]]:
    """Without the padding of the reference's batch."""
    masks = case.get("attention_mask") or [[1] * len(row) for row in case["prompt_ids"]]
    return [[token for token, real in zip(row, mask, strict=True) if real] for row, mask in zip(case["prompt_ids"], masks, strict=True)]


def run(lm: LanguageModel, case: dict[str, Any], rows: list[list[int]], **settings: Any) -> tuple[Canvas, list[Frame]]:
    plan = official.plan(lm, case["settings"] | settings, case.get("sampler", ""))
    canvas = Canvas.from_rows([[*row, *[None] * plan.max_new_tokens] for row in rows], fill=lm.tokenizer.mask_id)
    return canvas, list(plan.sampler.steps(canvas, rng=generators(0, len(rows))))


def text(canvas: Canvas, frame: Frame, row: int) -> list[int]:
    ids: list[int] = frame.tokens_BT[row][canvas.valid_BT[row]].tolist()
    return ids


@pytest.mark.parametrize(("family", "case"), CASES)
def test_the_ids_of_the_reference(family: str, case: dict[str, Any]) -> None:
    canvas, frames = run(model(family), case, prompts(case))
    for row, expected in enumerate(case["output_ids"]):
        found = text(canvas, frames[-1], row)
        begin = len(expected) - len(found) if case.get("sampler") == "bd3lm" or case.get("attention_mask") else 0
        assert expected[begin : begin + len(found)] == found
        assert set(expected[:begin] + expected[begin + len(found) :]) <= {272, 273}  # padding of the reference's batch


@pytest.mark.parametrize(("family", "case"), [p for p in CASES if p.values[1]["calls"]])  # type: ignore[index]
def test_every_forward_pass_reads_what_the_reference_reads(family: str, case: dict[str, Any]) -> None:
    lm = model(family)
    canvas, frames = run(lm, case, prompts(case))
    read = [canvas.tokens_BT[0].tolist(), *(text(canvas, frame, 0) for frame in frames[:-1])]
    expected = [call[0] for call in case["calls"]]
    if family == "sdar":
        mask_id, begin = lm.tokenizer.mask_id, len(prompts(case)[0])
        expected = [ids for ids in expected if mask_id in ids]  # the others fill the reference's cache
        read = [row[(start := row.index(mask_id, begin) // 4 * 4) : start + 4] for row in read]
    if family == "nemotron_labs_diffusion":  # the reference reads the text alone for the first token of a block, and once more at the end
        mask_id, size, begin = lm.tokenizer.mask_id, case["settings"]["block_length"], len(prompts(case)[0])
        expected = expected[:-1]
        starts = [begin + (row.index(mask_id) - begin) // size * size for row in read]
        read = [row[:start] if row[start] == mask_id else row[: start + size] for row, start in zip(read, starts, strict=True)]
    if case.get("sampler") == "bd3lm":  # the reference keeps keys and values of finished blocks, and reads a block alone
        size, begin = case["settings"]["block_size"], len(prompts(case)[0])
        blocks = [ids for ids in expected if len(ids) == size and lm.tokenizer.mask_id in ids]
        expected = blocks[:: 2 if case["settings"].get("cfg_scale") else 1]  # with and without the prompt
        starts = [begin + (row.index(lm.tokenizer.mask_id) - begin) // size * size for row in read]
        read = [row[start : start + size] for row, start in zip(read, starts, strict=True)]
    assert read == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_alone_and_in_a_batch(family: str) -> None:
    """Rows of other lengths and, in LLaDA's and dllm's blocks, of other phases."""
    lm, case = model(family), cases(family)[1]
    own = prompts(case)[0]
    rows = [own, own[:4], [*own, *own]]
    canvas, frames = run(lm, case, rows)
    for row, prompt in enumerate(rows):
        alone, steps = run(lm, case, [prompt])
        assert text(canvas, frames[-1], row) == text(alone, steps[-1], 0)


@pytest.mark.parametrize("family", ["a2d_qwen3", "llada"])
def test_rows_that_join_and_leave(family: str) -> None:
    lm, case = model(family), cases(family)[1]
    own = prompts(case)[0]
    plan = official.plan(lm, case["settings"], case.get("sampler", ""))

    def begun(prompt: list[int], seed: int) -> Any:
        canvas = Canvas.from_rows([[*prompt, *[None] * plan.max_new_tokens]], fill=lm.tokenizer.mask_id)
        return plan.sampler.begin(canvas, rng=generators(seed, 1))

    together = begun(own, 0)
    together.step()
    together.join(begun([*own, *own], 0))
    while bool(together.live_B.any()):
        frame = together.step()
    for row, prompt in enumerate([own, [*own, *own]]):
        canvas, frames = run(lm, case, [prompt])
        length = len(prompt) + plan.max_new_tokens
        assert frame.tokens_BT[row][:length].tolist() == text(canvas, frames[-1], 0)


def test_block_diffusion_ends_with_a_block_that_holds_a_stop() -> None:
    lm = model("a2d_qwen3")
    case = next(c for c in cases("a2d_qwen3") if c["name"] == "bd3lm, blocks of 4, 2 steps each")
    plan = official.plan(lm, case["settings"], "bd3lm")
    prompt = prompts(case)[0]
    expected = case["output_ids"][0][3:]
    stop = expected[len(prompt) + 1]  # written in the first block
    canvas = Canvas.from_rows([[*prompt, *[None] * 16]], fill=lm.tokenizer.mask_id)
    *_, last = replace(plan.sampler, stops=frozenset({stop})).steps(canvas, rng=generators(0, 1))
    assert last.tokens_BT[0].tolist() == [*expected[: len(prompt) + 4], *[lm.tokenizer.mask_id] * 12]
    assert last.forwards == 2


def test_suppressed_stops_are_not_written() -> None:
    lm, case = model("llada"), cases("llada")[0]
    canvas, frames = run(lm, case, prompts(case))
    assert 273 in text(canvas, frames[-1], 0)[11:]
    canvas, frames = run(lm, case, prompts(case), logits_eos_inf=True)
    assert 273 not in text(canvas, frames[-1], 0)[11:]


def test_random_remasking_and_origin_follow_the_seed() -> None:
    llada, case = model("llada"), cases("llada")[0]
    first, second = (run(llada, case, prompts(case), remasking="random")[1] for _ in range(2))
    assert [f.tokens_BT.tolist() for f in first] == [f.tokens_BT.tolist() for f in second]
    assert len(first) == 16
    dream, case = model("dream"), cases("dream")[0]
    _, frames = run(dream, case, prompts(case), alg="origin", temperature=1.0)
    assert len(frames) <= 16
    assert dream.tokenizer.mask_id not in frames[-1].tokens_BT


def test_positions_drawn_in_proportion_to_the_score() -> None:
    """alg_temp near 0 takes the best positions, a large one takes others."""
    lm, case = model("dream"), cases("dream")[0]
    best = run(lm, case, prompts(case))[1][-1].tokens_BT
    assert torch.equal(run(lm, case, prompts(case), alg_temp=1e-9)[1][-1].tokens_BT, best)
    assert not torch.equal(run(lm, case, prompts(case), alg_temp=100.0)[1][-1].tokens_BT, best)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown setting": ("llada", {"alg": "entropy"}, "llada has no setting 'alg'"),
    "remasking": ("llada", {"remasking": "high"}, "low_confidence or random"),
    "alg": ("dream", {"alg": "best"}, "origin, maskgit_plus"),
    "eps": ("dream", {"eps": 0.1}, "eps is 0.001 here"),
    "temperature": ("a2d_qwen3", {"temperature": -1.0}, "temperature"),
    "steps": ("llada", {"steps": 0}, "steps must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_cannot_be(case: str) -> None:
    family, settings, message = BAD[case]
    with pytest.raises(InputError, match=message):
        official.plan(model(family), settings)


def test_generate_uses_the_reference_sampler() -> None:
    """A chat of LLaDA: the same ids as the settings by the reference's names, up to the first stop, after which no block is computed."""
    lm, case = model("llada"), cases("llada")[2]
    canvas, frames = run(lm, case, prompts(case))
    settings: TextKeywords = {"steps": 16, "block_length": 8, "max_new_tokens": 32}
    generation = lm.generate(prompts(case), **settings)[0]
    expected, first = text(canvas, frames[-1], 0), text(canvas, frames[-1], 0)[11:].index(273)
    found = generation.trajectory.current_BT[0].tolist()
    assert found[: 11 + first + 1] == expected[: 11 + first + 1]
    assert found[11 + first // 8 * 8 + 8 :] == [lm.tokenizer.mask_id] * (24 - first // 8 * 8)
    assert generation.forwards < frames[-1].forwards
    assert generation.sampler == "llada"
    assert generation.text == lm.tokenizer.decode(expected[: 11 + first])


WORDS: list[tuple[str, str, dict[str, Any], str, dict[str, Any]]] = [
    ("llada", "mdlm", {"steps": 16, "block_length": 8}, "mdlm", {"steps": 16, "block_size": 8, "max_new_tokens": 16}),
    (
        "dream",
        "dream:topk_margin",
        {"steps": 8, "temperature": 0.0, "top_p": 0.9},
        "dream",
        {"alg": "topk_margin", "top_p": 0.9, "steps": 8},
    ),
    ("dream", "dream", {"steps": 8, "temperature": 0.0, "top_p": 0.9}, "dream", {"alg": "entropy", "top_p": 0.9, "steps": 8}),
    ("a2d_qwen3", "bd3lm", {"steps": 8, "block_length": 4, "guidance": 2.0}, "bd3lm", {"steps": 8, "block_size": 4, "cfg_scale": 1.0}),
    ("a2d_qwen3", "llada:random", {"steps": 8, "block_length": 4}, "llada", {"steps": 8, "block_length": 4, "remasking": "random"}),
]


@pytest.mark.parametrize(("family", "word", "options", "reference", "settings"), WORDS, ids=[f"{w[0]} {w[1]}" for w in WORDS])
def test_words_mean_the_settings_of_the_reference(
    family: str, word: str, options: dict[str, Any], reference: str, settings: dict[str, Any]
) -> None:
    lm = model(family)
    own = prompts(cases(family)[0])[0]
    length = "gen_length" if reference == "llada" else "max_new_tokens"
    plan = official.plan(lm, settings | {length: 16}, reference)
    canvas = Canvas.from_rows([[*own, *[None] * 16]], fill=lm.tokenizer.mask_id)
    *_, expected = plan.sampler.steps(canvas, rng=generators(3, 1))
    made = lm.sampler(sampler=word, **options)
    assert isinstance(made, DiffusionSampler)
    made = replace(made, stops=plan.sampler.stops, ends=plan.sampler.ends)  # the reference may go on after a stop
    *_, found = made.steps(canvas, rng=generators(3, 1))
    assert torch.equal(found.tokens_BT, expected.tokens_BT)
    assert found.forwards == expected.forwards


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "word", ["topk", "confidence:0.2", "factor:2", "entropy-bound:1", "klass:0.1", "ancestral", "first-hitting", "remdm-cap"]
)
def test_our_samplers_on_models_of_others(family: str, word: str) -> None:
    """A row alone and beside a longer one gives the same text, and neither mask nor padding of the vocabulary is written."""
    lm = model(family)
    own = prompts(cases(family)[0])[0]
    rows = [own[:5], own]
    options: TextKeywords = {"sampler": word, "steps": 6, "temperature": 0.5, "max_new_tokens": 12}
    together = lm.generate(rows, seed=5, **options)
    for row, prompt in enumerate(rows):
        (alone,) = lm.generate([prompt], seed=5 + row, **options)
        assert isinstance(lm.noise, MaskedNoise)
        ids = alone.trajectory.current_BT[0].tolist()
        assert together[row].trajectory.current_BT[row][: len(ids)].tolist() == ids
        end = next((i for i, token in enumerate(ids) if i >= len(prompt) and token in lm.stops), len(ids))
        assert max(ids) < lm.noise.tokens
        assert lm.tokenizer.mask_id not in ids[:end]
    assert together[0].forwards <= 12


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sdar", {"cache": "dual"}, "has an exact cache already"),
    ("a2d_qwen3", {"sampler": "bd3lm", "cache": "dual"}, "bd3lm has an exact cache already"),
    ("llada", {"sampler": "speculative", "cache": "dual"}, "an approximate cache changes"),
    ("llada", {"schedule": "L0.5 H0.5", "light": "shakespeare-mask-2"}, "a schedule of models is for those that dlm trains"),
    ("llada", {"sampler": "llada:high"}, "low_confidence or random"),
    ("llada", {"sampler": "dream:best"}, "alg is origin"),
    ("dream", {"sampler": "bd3lm"}, "predicts each token itself"),
    ("dream", {"sampler": "revoke"}, "cannot use a sampler that checks"),
    ("a2d_qwen3", {"sampler": "bd3lm", "block_length": 7}, "must divide the window"),
]


@pytest.mark.parametrize(("family", "options", "message"), REFUSED, ids=[f"{r[0]} {r[2]}" for r in REFUSED])
def test_what_cannot_be_used_is_told(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(family).generate("the", max_new_tokens=4, **options)


def test_a_template_is_filled_by_the_reference_sampler() -> None:
    generation = model("llada").generate(template="the __ of _ an", steps=2)
    assert generation.tokens == 3
    assert generation.text.startswith("the ") or "\ufffd" in generation.text


def test_sdar_generates_and_ends_with_a_block_that_holds_a_stop() -> None:
    lm, case = model("sdar"), cases("sdar")[0]
    (generation,) = lm.generate(prompts(case), sampler="llada", steps=16, temperature=0.0, max_new_tokens=15)
    expected = case["output_ids"][0]
    ids = generation.trajectory.current_BT[0].tolist()
    assert ids[:12] == expected[:12]  # the first new token is <|im_end|>, its block ends at 12
    assert ids[12:] == [lm.tokenizer.mask_id] * 12
    assert generation.forwards == 3
    assert generation.text == lm.tokenizer.decode(expected[:9])
    with pytest.raises(InputError, match="not read block by block"):
        official.plan(model("llada"), {}, "sdar")
    with pytest.raises(InputError, match="remasking_strategy is"):
        official.plan(lm, {"remasking_strategy": "x"})


@pytest.mark.parametrize("word", ["revoke:0.3", "planner:1"])
def test_a_row_that_is_checked_alone_and_in_a_batch(word: str) -> None:
    """Rows of several lengths: padding is neither text nor mask to a shadow."""
    lm, options = load(str(GOLDEN / "llada")), {"max_new_tokens": 16, "sampler": word, "steps": 8, "temperature": 0.8}
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
    both = lm.generate(prompts, seed=1, **options)  # type: ignore[call-overload]
    for row, prompt in enumerate(prompts):
        alone = lm.generate([prompt], seed=1 + row, **options)[0]  # type: ignore[call-overload]
        assert both[row].text == alone.text
        assert both[row].trajectory.current_BT[row].tolist()[: len(prompt) + 16] == alone.trajectory.current_BT[0].tolist()
