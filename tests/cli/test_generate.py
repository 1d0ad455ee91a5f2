"""`dlm generate`: where the model stands, drafters by plain options, and the line of figures after a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import Dlm


def record(dlm: Dlm, *words: str) -> dict[str, Any]:
    code, out, err = dlm("generate", *words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def test_the_model_stands_after_the_prompt_or_in_an_option(dlm: Dlm, autoregressive_dir: Path) -> None:
    words = ("ROMEO:", "--max-new-tokens", "5")
    found = [record(dlm, *words, str(autoregressive_dir)), record(dlm, *words, "--model", str(autoregressive_dir))]
    assert found[0]["model"] == "tiny-ar"
    assert found[0]["text"] == found[1]["text"]
    assert "given twice" in dlm.told("generate", "ROMEO:", "one", "--model", "two")


@pytest.mark.parametrize("old", ["--heavy", "--base"])
def test_old_names_of_the_model_warn(dlm: Dlm, masked_dir: Path, old: str) -> None:
    words = ("--length", "20", "--steps", "2")
    code, out, err = dlm("generate", old, str(masked_dir), *words)
    assert (code, out) == dlm("generate", "--model", str(masked_dir), *words)[:2]
    assert f"warning: {old} is an old spelling, which the next version drops: write --model\n" in err


def test_a_prompt_that_is_the_name_of_a_model_gets_a_hint(dlm: Dlm) -> None:
    words = ("--max-new-tokens", "2", "--steps", "1", "--sampler", "topk")
    assert "dlm generate --model shakespeare-ar" in dlm("generate", "shakespeare-ar", *words)[2]


def test_without_arguments_it_writes_shakespeare(dlm: Dlm) -> None:
    found = record(dlm, "--steps", "2")
    assert found["model"] == "shakespeare-words"
    assert found["tokens"] == 128


@pytest.mark.parametrize(
    ("plain", "short"),
    [
        (("--draft", "ngram", "--draft-tokens", "3"), "lookup:4"),
        (("--draft", "ngram"), "lookup:auto"),
        (("--draft", "ngram", "--draft-tokens", "auto"), "lookup:auto"),
        (("--draft", "self:int4", "--draft-tokens", "7"), "draft:int4:8"),
        (("--draft", "adapter", "--draft-tokens", "3", "--draft-tree", "8"), "strided:4x8"),
    ],
)
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_a_draft_by_plain_options_is_the_short_form(
    dlm: Dlm, autoregressive_dir: Path, plain: tuple[str, ...], short: str, temperature: str
) -> None:
    words = ("ROMEO:", str(autoregressive_dir), "--max-new-tokens", "24", "--temperature", temperature, "--seed", "3")
    baseline = record(dlm, *words)
    found = [record(dlm, *words, *plain), record(dlm, *words, "--sampler", short)]
    assert found[0]["sampler"] == found[1]["sampler"] == short
    for one in found:
        assert one["text"] == baseline["text"]
        assert one["proposed"] > 0


@pytest.mark.parametrize("name", ["int4", "small,4"])
def test_a_draft_model_in_a_directory_of_any_name(dlm: Dlm, autoregressive_dir: Path, name: str) -> None:
    shutil.copytree(autoregressive_dir, name)
    words = ("ROMEO:", str(autoregressive_dir), "--max-new-tokens", "24", "--temperature", "0")
    found = record(dlm, *words, "--draft", f"./{name}", "--draft-tokens", "3")
    assert found["text"] == record(dlm, *words)["text"]
    assert found["accepted"] == found["proposed"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--draft-tokens", "4"), "add --draft"),
        (("--draft-tree", "4"), "add --draft"),
        (("--draft", "ngram", "--draft-tokens", "many"), "a whole number or auto"),
        (("--draft", "ngram", "--draft-tokens", "-1"), "a whole number or auto"),
        (("--draft", "ngram", "--draft-tree", "8"), "second choices"),
        (("--draft", "ngram", "--sampler", "lookup:4"), "--draft chooses the sampler"),
        (("--draft", "ngram", "--lossless"), "--lossless chooses the drafter"),
        (("--draft", "self:int3"), "'int3'"),
        (("--lossless", "--sampler", "lookup"), "--lossless chooses the sampler"),
        (("--samples", "0"), "'--samples'"),
        (("--temperature", "-1"), "must be at least 0, got -1.0"),
        (("--top-p", "1.5"), "must lie in 0 .. 1, got 1.5"),
        (("--length", "0"), "must lie in 1 .. 10,000,000, got 0"),
        (("-n", "2", "--template", "a_b"), "a template makes one"),
    ],
)
def test_bad_options_are_told_before_a_model_is_loaded(dlm: Dlm, words: tuple[str, ...], told: str) -> None:
    assert told in dlm.told("generate", "--model", "no-such-model", *words)


def test_steps_are_refused_where_there_are_none(dlm: Dlm, autoregressive_dir: Path, masked_dir: Path) -> None:
    assert "is autoregressive and writes one token" in dlm.told("generate", "R", str(autoregressive_dir), "--steps", "4")
    words = ("generate", "R", "--compare", f"{autoregressive_dir},{masked_dir}", "--steps", "4", "--max-new-tokens", "6")
    assert dlm(*words)[0] == 0  # in a comparison each model takes the options that it knows


def test_compilation_is_an_option(dlm: Dlm, autoregressive_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install g" in dlm.told("generate", "R", str(autoregressive_dir), "--compile")


def test_settings_of_a_sampler_after_commas_warn(dlm: Dlm, autoregressive_dir: Path) -> None:
    words = ("ROMEO:", str(autoregressive_dir), "--max-new-tokens", "12")
    code, out, err = dlm("generate", *words, "--sampler", "lookup:8,0.2")
    assert (code, out) == dlm("generate", *words, "--sampler", "lookup:8:0.2")[:2]
    assert "write --sampler lookup:8:0.2\n" in err


def test_figures_after_a_run(dlm: Dlm, masked_dir: Path, autoregressive_dir: Path) -> None:
    _, out, err = dlm("generate", "--model", str(masked_dir), "--length", "20", "--steps", "4")
    assert re.fullmatch(r"tiny-masked, ancestral, seed 0: 20 tokens in \d forward passe?s?, \d+\.\d a pass, \d+\.\d s\n", err)
    assert len(out) == 21
    *_, err = dlm("generate", "--model", str(masked_dir), "--length", "20", "--steps", "4", "--sampler", "topk", "-n", "3")
    assert re.fullmatch(r"tiny-masked, topk, seeds 0 to 2, each: 20 tokens in 4 forward passes, 5\.0 a pass, \d+\.\d s\n", err)
    _, _, err = dlm("generate", "R", str(autoregressive_dir), "--max-new-tokens", "12", "--draft", "ngram", "--draft-tokens", "2")
    assert re.search(r"; \d+% of \d+ draft tokens accepted\n", err)
