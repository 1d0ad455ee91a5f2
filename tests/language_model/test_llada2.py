"""The reference samplers of LLaDA2.0 and 2.1: golden generations forward pass by forward pass, and the parts of their rules."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.language_model import LanguageModel, load, official
from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion.editing import AboveThreshold, Editing
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame

GOLDEN = Path(__file__).parents[1] / "golden" / "llada2_moe"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "generations.json").read_text())["cases"]
EDITED = CASES[2]
GREEDY = Draw(0.0)
NAMES = [case["name"] for case in CASES]


@cache
def model() -> LanguageModel:
    return load(str(GOLDEN))


def run(case: dict[str, Any], rows: list[list[int]] | None = None, **settings: Any) -> tuple[official.Plan, list[Frame]]:
    rows, plan = rows or case["prompt_ids"], official.plan(model(), case["settings"] | settings)
    canvas = Canvas.from_rows([[*row, *[None] * plan.room(len(row))] for row in rows], fill=277)
    return plan, list(plan.sampler.steps(canvas, rng=generators(0, len(rows))))


def new(plan: official.Plan, frame: Frame, row: int = 0, prompt: int = 9) -> list[int]:
    return plan.cut(frame.tokens_BT[row, prompt : prompt + plan.room(prompt)].tolist())


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_forward_pass_reads_what_the_reference_reads(case: dict[str, Any]) -> None:
    plan, frames = run(case)
    start = [*case["prompt_ids"][0], *[277] * plan.room(9)]
    read = [start, *(frame.tokens_BT[0].tolist() for frame in frames[:-1])]
    expected = [call[0] for call in case["calls"]]
    assert [row[: len(call)] for row, call in zip(read, expected, strict=True)] == expected  # the reference reads no later block
    assert new(plan, frames[-1]) == case["output_ids"][0]


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no editing": (EDITED, {"editing_threshold": None}),
    "editing above another threshold": (EDITED, {"editing_threshold": 0.5}),
    "fewer forward passes without masks": (EDITED, {"max_post_steps": 1}),
    "another threshold": (CASES[1], {"threshold": 0.9}),
    "another block": (CASES[1], {"block_length": 4}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_setting_is_told_from_the_right_one(wrong: str) -> None:
    case, settings = WRONG[wrong]
    plan, frames = run(case, **settings)
    assert new(plan, frames[-1]) != case["output_ids"][0]


@pytest.mark.parametrize("case", CASES[1:3], ids=NAMES[1:3])
def test_a_row_alone_and_in_a_batch(case: dict[str, Any]) -> None:
    own = case["prompt_ids"][0]
    rows = [own, own[:4], [*own, *own]]
    plan, frames = run(case, rows)
    for row, prompt in enumerate(rows):
        alone = run(case, [prompt])[1][-1]
        assert new(plan, frames[-1], row, len(prompt)) == new(plan, alone, 0, len(prompt))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_text_that_ends_inside_a_block_is_written_to_its_end_and_cut(case: dict[str, Any]) -> None:
    expected = case["output_ids"][0]
    plan, frames = run(case, gen_length=len(expected) - 2)
    assert new(plan, frames[-1]) == expected[:-2]
    assert len(frames) <= len(case["calls"])


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_generate_writes_the_ids_of_the_reference_at_every_length(case: dict[str, Any]) -> None:
    """Masks that nobody sees fill the last block, also of a row in a batch, whose padding they take."""
    settings, expected, prompt = case["settings"], case["output_ids"][0], case["prompt_ids"][0]
    edits = settings.get("editing_threshold")
    word = f"llada2:{settings['threshold']}" if edits is None else "llada2.1"
    options: Any = {"sampler": word, "block_length": settings["block_length"], "temperature": 0.0}
    if edits is not None:
        options["sampler"] = Editing(settings["threshold"], edits, settings["max_post_steps"], GREEDY)
    for count in range(1, len(expected) + 1, 3):
        (found,) = model().generate([prompt], max_new_tokens=count, **options)
        assert found.trajectory.current_BT[0, 9:].tolist() == expected[:count]
    short, _ = model().generate([prompt, [*prompt, *prompt]], max_new_tokens=5, **options)
    assert short.trajectory.current_BT[0, 9:14].tolist() == expected[:5]
    assert short.text == model().tokenizer.spelling.text([*prompt, *expected[:5]])


def test_a_last_block_cut_short_writes_other_ids() -> None:
    """A sampler that reads no mask after the text, as if the block ended with it."""
    case, expected = CASES[1], CASES[1]["output_ids"][0]
    plan = official.plan(model(), case["settings"] | {"gen_length": 9})
    canvas = Canvas.from_rows([[*case["prompt_ids"][0], *[None] * 9]], fill=277)
    *_, last = replace(plan.sampler, block_phase="prompt").steps(canvas, rng=generators(0, 1))
    *_, whole = plan.sampler.steps(canvas, rng=generators(0, 1))
    assert new(plan, whole) == expected[:9]
    assert new(plan, last) != expected[:9]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_text_ends_with_its_first_stop_once_the_block_is_done(case: dict[str, Any]) -> None:
    expected, length = case["output_ids"][0], case["settings"]["block_length"]
    stop = expected[6]
    plan, frames = run(case, eos_id=stop)
    assert new(plan, frames[-1]) == expected[: expected.index(stop) + 1]
    end = (9 + expected.index(stop)) // length * length + length
    assert len(frames) == sum(len(call[0]) <= end for call in case["calls"])
    if "editing_threshold" not in case["settings"]:
        early, others = run(case, eos_id=stop, eos_early_stop=True)
        assert new(early, others[-1]) == new(plan, frames[-1])
        assert len(others) <= len(frames)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alg": "entropy"}, "llada2 has no setting 'alg'"),
        ({"threshold": 1.5}, "the threshold"),
        ({"editing_threshold": -0.1}, "the editing threshold"),
        ({"editing_threshold": 0.9, "eos_early_stop": True}, "eos_early_stop of LLaDA2.1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"block_length": 7}, "must divide the window"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        official.plan(model(), settings)
    with pytest.raises(InputError, match="not read block by block"):
        official.plan(load(str(GOLDEN.parent / "llada")), {}, "llada2")


WORDS: dict[str, dict[str, Any]] = {
    "llada2": {"steps": 8},
    "llada2:0.3": {"steps": 8, "threshold": 0.3},
    "llada2.1:0.5:0.4": {"threshold": 0.5, "editing_threshold": 0.4},
}


@pytest.mark.parametrize("word", WORDS)
def test_words_mean_the_settings_of_the_reference(word: str) -> None:
    plan, frames = run(CASES[0], **{"block_length": 8, "gen_length": 15, "threshold": 0.95} | WORDS[word])
    (found,) = model().generate(CASES[0]["prompt_ids"], sampler=word, steps=48, block_length=8, temperature=0.0, max_new_tokens=15)
    assert found.trajectory.current_BT[0, 9:].tolist() == new(plan, frames[-1])
    assert found.forwards == len(frames)


def test_the_default_is_the_reference_of_the_model_card() -> None:
    (found,) = model().generate(CASES[0]["prompt_ids"], max_new_tokens=55)
    plan, frames = run(CASES[0], block_length=32, steps=32, gen_length=55)
    assert found.sampler == "llada2"
    ids = found.trajectory.current_BT[0, 9:].tolist()
    assert ids == frames[-1].tokens_BT[0, 9:64].tolist()
    (short,) = model().generate(CASES[0]["prompt_ids"], max_new_tokens=30)
    assert short.trajectory.current_BT[0, 9:].tolist() == ids[:30]
    assert plan.sampler.block_length == 32


@pytest.mark.parametrize("word", ["topk", "confidence:0.3", "factor:2", "klass:0.1", "ancestral", "remdm-cap", "llada2.1:0.4:0.3"])
def test_our_samplers_on_it(word: str) -> None:
    """A row alone and beside a longer one gives the same text, and neither mask nor padding of the vocabulary is written."""
    rows = [CASES[0]["prompt_ids"][0][:5], CASES[0]["prompt_ids"][0]]
    options: Any = {"sampler": word, "steps": 40, "temperature": 0.5, "max_new_tokens": 12, "block_length": 8}
    together = model().generate(rows, seed=5, **options)
    for row, prompt in enumerate(rows):
        (alone,) = model().generate([prompt], seed=5 + row, **options)
        ids = alone.trajectory.current_BT[0].tolist()
        assert together[row].trajectory.current_BT[row][: len(ids)].tolist() == ids
        written = ids[: ids.index(277)] if 277 in ids else ids  # after a stop nothing is written
        assert max(written) < 277
        assert len(written) > len(prompt)


def step(sure: list[float], z: list[int], *, left: int = 4, steps: int = 4) -> Step:
    """Token 1 has the probability `sure` at each position; 9 is the mask, position 0 is given."""
    noise, z_BT = MaskedNoise(10, 9), torch.tensor([z])
    logits_BTV = torch.full((1, len(z), 10), -torch.inf)
    logits_BTV[0, :, 1], logits_BTV[0, :, 2:9] = torch.tensor(sure).log(), ((1 - torch.tensor(sure)) / 7).log()[:, None]
    open_BT = torch.arange(len(z))[None] > 0
    logp_BTV = noise.log_probs(logits_BTV, torch.where(open_BT, 9, z_BT))
    now_B = torch.ones(1, dtype=torch.float64)
    return Step(z_BT, open_BT, logp_BTV, now_B, now_B / 2, torch.tensor([left]), steps, noise)


def after(rule: AboveThreshold | Editing, given: Step) -> list[int]:
    ids: list[int] = rule(given, [])[0].tolist()
    return ids


def test_all_above_the_threshold_or_the_share() -> None:
    sure, masks = [0.9, 0.25, 0.75, 0.5, 0.875], [3, 9, 9, 9, 9]
    assert after(AboveThreshold(0.95, draw=GREEDY), step(sure, masks)) == [3, 9, 9, 9, 1]
    assert after(AboveThreshold(0.6, draw=GREEDY), step(sure, masks)) == [3, 9, 1, 9, 1]
    assert after(AboveThreshold(1.0, draw=GREEDY), step([1.0] * 5, masks)).count(1) == 1  # above, not at it
    assert after(AboveThreshold(0.95, draw=GREEDY), step(sure, masks, left=2)) == [3, 9, 1, 9, 1]
    assert after(AboveThreshold(0.95, 8, GREEDY), step(sure, masks)) == [3, 9, 1, 9, 1]  # two of a block of eight in four steps
    assert after(AboveThreshold(0.95, 9, GREEDY), step(sure, masks)) == [3, 9, 1, 1, 1]  # and the remainder in the first
    assert after(AboveThreshold(0.95, 9, GREEDY), step(sure, masks, left=3)) == [3, 9, 1, 9, 1]
    assert after(AboveThreshold(0.95, 64, GREEDY), step(sure, masks)) == [3, 1, 1, 1, 1]


def test_written_tokens_are_replaced_by_surer_ones() -> None:
    sure = [0.99, 0.75, 0.75, 0.5, 0.25]
    given = step(sure, [3, 2, 1, 2, 9], left=9)
    assert after(Editing(0.95, 0.6, draw=GREEDY), given) == [3, 1, 1, 2, 1]  # at least one mask, and the prompt stays
    assert after(Editing(0.95, 0.75, draw=GREEDY), given) == [3, 2, 1, 2, 1]
    assert after(Editing(0.1, 0.4, draw=GREEDY), given) == [3, 1, 1, 1, 1]


@pytest.mark.parametrize(("passes", "quiet", "done"), [(16, False, False), (16, True, True), (1, False, True), (0, False, True)])
def test_a_block_is_done_when_nothing_changes_or_after_some_passes(passes: int, quiet: bool, done: bool) -> None:
    sure, ids = [0.9] * 5, [3, 2, 1, 1, 1]
    rule, given = Editing(0.95, 0.99 if quiet else 0.6, passes, GREEDY), step([0.9] * 5, ids, left=20)
    next_BT = rule(given, [])
    assert rule.done(given, next_BT).tolist() == [done]
    masked = step(sure, [3, 9, 9, 1, 1], left=20)
    assert rule.done(masked, rule(masked, [])).tolist() == [False]  # a mask is left
    last = step(sure, [3, 9, 1, 1, 1], left=20)
    assert rule.done(last, rule(last, [])).tolist() == [passes == 0]  # one more pass looks at what was written


def test_an_edited_block_ends_within_its_steps() -> None:
    """A network that never settles: masks are written in time, and the passes without masks are counted."""

    def restless(z_BT: Tensor, t_B: Tensor, **_how: Any) -> Tensor:
        logits_BTV = torch.zeros(*z_BT.shape, 288)
        return logits_BTV.scatter_(-1, ((z_BT + 1) % 60)[..., None], 9.0)

    for case in CASES[2:]:
        plan = official.plan(model(), case["settings"])
        canvas = Canvas.from_rows([[*case["prompt_ids"][0], *[None] * 23]], fill=277)
        sampler = plan.sampler.__class__(**{**vars(plan.sampler), "denoiser": restless})
        frames = list(sampler.steps(canvas, rng=generators(0, 1)))
        assert 277 not in frames[-1].tokens_BT
        assert len(frames) <= 3 * (8 + case["settings"]["max_post_steps"])
