"""Options by name, and every drafter by an option of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_model
from dlm.errors import InputError
from dlm.language_model import LanguageModel, load
from dlm.language_model.options import DecodingKeywords, DecodingOptions, Draft, LayoutKeywords
from dlm.sampling.autoregressive.draft import SHORT
from dlm.sampling.diffusion.unmasking import TopScore
from dlm.sampling.draw import Draw

WORDS: list[tuple[str, Draft]] = [
    ("strided", Draft("adapter", tokens=3)),
    ("strided:1", Draft("adapter", tokens=0)),
    ("strided:auto", Draft("adapter")),
    ("strided:4x16", Draft("adapter", tokens=3, tree=16)),
    ("lookup:8,0.2", Draft("ngram", tokens=7, floor=0.2)),
    ("heads:4", Draft("heads", tokens=3)),
    ("draft:int4", Draft("self", "int4", 3)),
    ("draft:int8,auto", Draft("self", "int8")),
    ("draft:some/where,5", Draft("model", "some/where", 4)),
]


@pytest.mark.parametrize(("word", "draft"), WORDS)
def test_the_short_form_is_a_draft(word: str, draft: Draft) -> None:
    assert Draft.from_word(word) == draft
    assert Draft.from_word(draft.word) == draft


def test_another_sampler_is_no_draft() -> None:
    assert Draft.from_word("confidence:0.9") is None


TEXTS: list[tuple[str, Draft]] = [
    ("adapter", Draft("adapter")),
    ("ngram", Draft("ngram")),
    ("heads", Draft("heads")),
    ("self", Draft("self")),
    ("self:int4", Draft("self", "int4")),
    ("int4", Draft("model", "int4")),
    ("a,b:c", Draft("model", "a,b:c")),
    ("model:ngram", Draft("model", "ngram")),
]


@pytest.mark.parametrize(("text", "draft"), TEXTS)
def test_a_drafter_by_text(text: str, draft: Draft) -> None:
    assert Draft.parse(text) == draft


def test_the_numbers_of_a_draft() -> None:
    assert Draft.parse("adapter", tokens=3, tree=16, floor=0.1) == Draft("adapter", "", 3, 16, 0.1)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"source": "model"}, "directory or name"),
    ({"source": "adaptor"}, "did you mean adapter"),
    ({"source": "self", "model": "int5"}, "int8, int4"),
    ({"source": "ngram", "model": "x"}, "no model"),
    ({"source": "ngram", "tokens": -1}, "at least 0 and at most 256"),
    ({"source": "ngram", "floor": 1.5}, "floor of a draft must be at least 0"),
    ({"source": "ngram", "floor": float("nan")}, "floor of a draft must be at least 0"),
    ({"source": "ngram", "tree": 8}, "second choices"),
    ({"source": "adapter", "tokens": 8, "tree": 7}, "a node for each"),
    ({"source": "adapter", "tree": 65}, "64 at most"),
    ({"source": "adapter", "tree": -1}, "a node for each"),
]


@pytest.mark.parametrize(("fields", "said"), BAD)
def test_a_draft_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Draft(**fields)


@pytest.mark.parametrize("text", ["self:", "self:int5", "model:", ""])
def test_a_text_that_is_no_drafter(text: str) -> None:
    with pytest.raises(InputError):
        Draft.parse(text)


@pytest.fixture
def base(autoregressive_dir: Path) -> LanguageModel:
    return load(str(autoregressive_dir))


@pytest.mark.parametrize("name", ["int4", "a,b", "ngram"])
def test_a_draft_model_in_a_directory_of_any_name(name: str, base: LanguageModel, tmp_path: Path) -> None:
    """`draft:int4` and `draft:a,b` mean something else; the option reaches them, beside the model and elsewhere."""
    make_model("autoregressive").save_pretrained(tmp_path / "base")
    make_model("autoregressive").save_pretrained(tmp_path / "base" / name)
    lm = load(str(tmp_path / "base"))
    plain, drafted = (lm.generate("ROMEO:", length=40, seed=3, draft=draft) for draft in (None, Draft("model", name, 4)))
    assert drafted.text == plain.text
    assert drafted.forwards < plain.forwards / 2  # it drafts for itself, unquantized
    assert lm.other(name) is not lm
    assert base.generate("ROMEO:", length=40, seed=3, draft=Draft("model", str(tmp_path / "base" / name), 4)).proposed


@pytest.mark.parametrize(
    "draft",
    ["adapter", "ngram", "self", "self:int4", Draft("adapter", tree=16), Draft("adapter", tokens=2, tree=8), Draft("ngram", tokens=0)],
)
def test_a_draft_leaves_the_text_as_it_is(draft: Draft | str, base: LanguageModel) -> None:
    plain, drafted = (base.generate("ROMEO:", length=40, seed=3, draft=one) for one in (None, draft))
    assert drafted.text == plain.text


def test_a_quantized_copy_is_made_once(base: LanguageModel) -> None:
    assert base.quantized("int4") is base.quantized("int4")
    assert base.quantized("int4") is not base.quantized("int8")


def test_an_unknown_option_is_named_with_the_nearest(base: LanguageModel) -> None:
    wrong: Any = {"temprature": 0.7}
    for ask in (base.generate, base.sampler, lambda **options: list(base.stream(**options))):
        with pytest.raises(InputError, match="unknown option 'temprature'; did you mean temperature"):
            ask(**wrong)


WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"steps": "four"}, "steps takes a whole number or None, got 'four'"),
    ({"length": 2.5}, "length takes a whole number or None, got 2.5"),
    ({"temperature": "warm"}, "temperature takes a number or None"),
    ({"sampler": 3}, "sampler takes a text or a rule or None"),
    ({"prompt": 3}, "a prompt is a text, or a list"),
    ({"prompt": [3, 4]}, "a prompt is a text, or a list"),
]


@pytest.mark.parametrize(("options", "told"), WRONG_TYPES)
def test_a_value_of_another_type_is_named(options: dict[str, Any], told: str, base: LanguageModel) -> None:
    with pytest.raises(InputError, match=told):
        base.generate(**options)


def test_the_numbers_of_other_libraries_are_numbers() -> None:
    options = {"steps": torch.tensor(4), "temperature": np.float32(0.5), "guidance": 2}
    assert DecodingOptions.of(options).steps == 4


@pytest.mark.parametrize(("draft", "close"), [("ngrm", "ngram"), ("adaptor", "adapter")])
def test_a_misspelt_drafter_is_named_with_the_nearest(draft: str, close: str, base: LanguageModel) -> None:
    with pytest.raises(InputError, match=f"no drafter and no draft model '{draft}'; did you mean {close}"):
        base.generate("ROMEO:", length=12, draft=draft)


def test_a_misspelt_cache_is_named_with_the_nearest(masked_dir: Path) -> None:
    with pytest.raises(InputError, match=r"unknown cache 'prefx'; did you mean prefix\?"):
        load(str(masked_dir)).sampler(cache="prefx")


def test_a_draft_and_a_sampler_are_one_too_many(base: LanguageModel) -> None:
    with pytest.raises(InputError, match="leave sampler 'lookup' away"):
        base.sampler(sampler="lookup", draft="ngram")


def test_a_diffusion_model_has_no_draft(masked_dir: Path) -> None:
    with pytest.raises(InputError, match="for autoregressive"):
        load(str(masked_dir)).sampler(draft="ngram")


def test_the_docstring_has_the_short_form_of_every_drafter() -> None:
    assert [name for name in SHORT if f"`{name}:" not in (DecodingOptions.__doc__ or "")] == []


def test_keywords_and_fields_are_the_same() -> None:
    assert [*DecodingKeywords.__annotations__] == [*DecodingOptions.__dataclass_fields__]


@pytest.mark.parametrize("score", ["confidence", "margin"])
def test_a_rule_as_an_object_is_the_sampler_of_its_name(score: str) -> None:
    """The text, the draw and what it keeps of a run."""
    model = make_model()
    word = {"confidence": "topk", "margin": "margin"}[score]
    layout: LayoutKeywords = {"length": 20}
    named = model.generate("R", **layout, sampler=word, steps=5, temperature=0.5, seed=3)
    for found in (
        model.generate("R", **layout, sampler=TopScore(Draw(0.5), score), steps=5, seed=3),
        model.generate("R", **layout, sampler=TopScore(score=score), steps=5, temperature=0.5, seed=3),
    ):
        assert found.text == named.text
        assert found.forwards == named.forwards
        assert found.sampler == "TopScore"
    assert model.generate("R", **layout, sampler=TopScore(score=score), steps=5, seed=3).text != named.text
    assert model.generate("R", **layout, sampler=TopScore(), steps=5, until_settled=0, block_length=8).tokens == 19
    assert model.resolve(DecodingOptions(sampler=TopScore())) == model.resolve(DecodingOptions(sampler=TopScore()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("objective", "noise", "options", "told"),
    [
        ("autoregressive", "masked", {"sampler": TopScore()}, "needs a diffusion model"),
        ("diffusion", "uniform", {"sampler": TopScore()}, "needs masked noise"),
        ("diffusion", "masked", {"sampler": TopScore}, "a rule as an object"),
        ("diffusion", "masked", {"sampler": len}, "a rule as an object"),
        ("diffusion", "masked", {"sampler": TopScore(), "preset": "official"}, "leave draft, preset"),
        ("diffusion", "masked", {"sampler": 3}, "sampler takes"),
    ],
)
def test_a_rule_that_cannot_be_used_is_told(objective: str, noise: str, options: dict[str, Any], told: str) -> None:
    model = make_model(objective, noise={"process": noise, "schedule": "linear"})
    with pytest.raises(InputError, match=told):
        model.generate("R", length=10, **options)
