"""Texts that end before their canvas: the same text in fewer forward passes, and what is left out by an early stop.

Shapes: L positions of the canvas.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conftest import Dlm
from dlm.errors import InputError
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.unmasking import TopScore
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame
from goldens import BIDIRECTIONAL, GOLDEN, canvas, model, rows

SAMPLERS: list[dict[str, Any]] = [
    {"block_length": 4},
    {"sampler": "topk", "block_length": 4},
    {"sampler": "confidence:0.3"},
    {"sampler": "klass:0.1", "block_length": 8, "cache": "dual"},
]


def sampler(family: str, **options: Any) -> DiffusionSampler:
    made = model(family).sampler(**{"steps": 16, "temperature": 0.5, **options})
    assert isinstance(made, DiffusionSampler)
    return made


def run(made: DiffusionSampler, text: Canvas, seed: int = 0) -> list[Frame]:
    return list(made.steps(text, rng=generators(seed, len(text.tokens_BT))))


@pytest.mark.parametrize("family", [*BIDIRECTIONAL, "sdar"])
@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_a_text_that_has_ended_takes_no_more_forward_passes_and_stays_as_it_is(family: str, options: dict[str, Any]) -> None:
    """Each row by itself: a token that a whole run wrote is taken for a stop, early in one row and late in another."""
    if family == "sdar":
        options = options | {"cache": True, "block_length": 4}
    prompts = rows(family)
    text, made = canvas(family, prompts), sampler(family, **options)
    *_, whole = run(replace(made, stops=frozenset()), text)
    first = len(prompts[0])
    stop = int(whole.tokens_BT[0, first + 2])
    found = run(replace(made, stops=frozenset({stop})), text)
    ended = False
    for row, prompt in enumerate(prompts):
        expected = whole.tokens_BT[row, : len(prompt) + 16].tolist()
        end = expected.index(stop, len(prompt)) if stop in expected[len(prompt) :] else len(expected) - 1
        assert found[-1].tokens_BT[row, : end + 1].tolist() == expected[: end + 1]
        written = [i for i, token in enumerate(found[-1].tokens_BT[row].tolist()) if token != model(family).tokenizer.mask_id]
        ended |= max(written) < len(expected) - 1
    assert ended or "block_length" not in options
    alone = run(replace(made, stops=frozenset({stop})), canvas(family, prompts[:1]))
    assert alone[-1].forwards < whole.forwards or "block_length" not in options


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("cache", [True, "delayed:1", "dual"])
def test_an_early_stop_reads_nothing_after_it(family: str, cache: Any) -> None:
    """From the stop on, the run is that of a canvas which ends with it; caches forget what stood there."""
    lm, prompt = model(family), rows(family)[0]
    text = canvas(family, [prompt])
    options: dict[str, Any] = {"block_length": 0} if cache is not True else {}
    made = replace(sampler(family, cache=cache, early_stop=True, **options), rule=TopScore(Draw(0.0)), budget=16, block_length=0)
    whole = run(replace(made, stops=frozenset()), text)
    for token in whole[-1].tokens_BT[0, len(prompt) :].unique().tolist():  # one that is written once, before what stands before it
        stop, found = token, run(replace(made, stops=frozenset({token})), text)
        places = (found[-1].tokens_BT[0, len(prompt) :] == token).nonzero().flatten().tolist()
        first = next((f for f in found if token in f.tokens_BT[0, len(prompt) :].tolist()), found[-1])
        if len(places) == 1 and not first.settled_BT[0, len(prompt) : len(prompt) + places[0]].all():
            break
    else:
        raise AssertionError("no such token")
    step = next(k for k, f in enumerate(found) if stop in f.tokens_BT[0, len(prompt) :].tolist())
    at = found[step].tokens_BT[0].tolist().index(stop, len(prompt))
    assert found[-1].tokens_BT[0, at + 1 :].tolist() == whole[step].tokens_BT[0, at + 1 :].tolist()  # written before it, or never
    assert len(found) < len(whole)
    settled = found[step].settled_BT[0] & (found[step].tokens_BT[0] != lm.tokenizer.mask_id)
    held = [int(t) if s else None for t, s in zip(found[step].tokens_BT[0, : at + 1], settled, strict=False)]
    expected = run(replace(made, stops=frozenset()), Canvas.from_rows([held], fill=lm.tokenizer.mask_id))
    if cache != "dual":  # whose keys are those of the whole text
        assert found[-1].tokens_BT[0, : at + 1].tolist() == expected[-1].tokens_BT[0].tolist()


def test_a_suffix_is_read_after_an_early_stop() -> None:
    lm, prompt = model("llada"), rows("llada")[0]
    text = Canvas.from_rows([[*prompt, *[None] * 8, *prompt[:3], *[None] * 4]], fill=lm.tokenizer.mask_id)
    made = replace(sampler("llada", early_stop=True), rule=TopScore(Draw(0.0)), budget=12, block_length=0)
    whole = run(replace(made, stops=frozenset()), text)
    stop = int(whole[0].tokens_BT[0][(whole[0].settled_BT & text.free_BT)[0]][0])
    *_, last = run(replace(made, stops=frozenset({stop})), text)
    assert last.tokens_BT[0, len(prompt) + 8 :][:3].tolist() == prompt[:3]
    assert last.settled_BT.all()


def test_early_stop_is_refused_where_windows_are_filled(dlm: Dlm) -> None:
    assert "fills its windows" in dlm.told("generate", "a", "shakespeare-mask", "--early-stop")
    assert "needs a diffusion model" in dlm.told("generate", "a", "shakespeare-ar", "--early-stop")
    code, _, err = dlm("generate", "the", str(GOLDEN / "llada"), "--early-stop", "--steps", "8")
    assert code == 0, err
    with pytest.raises(InputError, match="early_stop takes True or False"):
        model("llada").generate("the", early_stop="yes")  # type: ignore[call-overload]
