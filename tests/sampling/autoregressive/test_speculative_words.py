"""Speculative decoding from its words: of a language model and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dlm
from conftest import Dlm, make_model
from dlm.adapters import lora
from dlm.language_model import load
from dlm.language_model.options import TextKeywords
from dlm.trajectory import Trajectory

WORDS = [
    "strided",
    "strided:2",
    "strided:auto",
    "strided:4x9",
    "lookup:auto",
    "draft:{},auto",
    "lookup",
    "lookup:8,0.3",
    "draft:{}",
    "draft:{},3",
    "draft:{},8,0.1",
    "draft:int4,8",
    "draft:int8,auto",
]


@pytest.mark.parametrize("word", WORDS)
def test_words_of_a_language_model(word: str, autoregressive_dir: Path) -> None:
    model, word = dlm.load(str(autoregressive_dir)), word.format(autoregressive_dir)
    draws: list[TextKeywords] = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}]
    for draw in draws:
        base, same = (
            model.generate(["ROMEO:", "But", "A"], seed=5, **(draw | {"length": 45, "sampler": sampler})) for sampler in (None, word)
        )
        assert [row.text for row in same] == [row.text for row in base]
        assert same[0].sampler == word
        assert same[0].forwards <= base[0].forwards


@pytest.mark.slow
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_the_command_writes_the_same_bytes(dlm: Dlm, temperature: str) -> None:
    words = ("generate", "ROMEO:", "--model", "shakespeare-ar", "--max-new-tokens", "30", "--temperature", temperature, "--seed", "2")
    code, base, _ = dlm(*words)
    assert code == 0
    assert len(base) > 30
    for sampler in ("lookup:4", "draft:shakespeare-ar", "strided:3", "lookup:auto"):
        assert dlm(*words, "--sampler", sampler)[:2] == (0, base), sampler


def test_lossless_takes_the_best_that_there_is(dlm: Dlm, autoregressive_dir: Path, masked_dir: Path, tmp_path: Path) -> None:
    model = load(str(autoregressive_dir))
    config = lora.AdapterConfig(rank=2, stride=3, base="x", fingerprint=lora.fingerprint(model.network))
    lora.attach(model.network, config, model.tokenizer.mask_id)
    lora.save_adapter(tmp_path / "adapter", model.network, config)
    words = ("generate", "ROMEO:", "--model", str(autoregressive_dir), "--max-new-tokens", "40")
    code, base, _ = dlm(*words)
    assert code == 0
    for options, chosen in (((), "lookup:auto"), (("--adapter", str(tmp_path / "adapter")), "strided:auto")):
        code, out, err = dlm(*words, *options, "--lossless", "--watch", "--save", "run.traj")
        assert (code, out) == (0, base), err
        run = Trajectory.load("run.traj")
        assert f"{chosen}, seed 0: 40 tokens in {run.forwards[-1]} forward passes, {40 / run.forwards[-1]:.1f} a pass" in err
        accepted, proposed = int(run.accepted_B), int(run.drafted_B)
        share = f"{accepted / proposed:.0%} of " if proposed else ""  # on a busy machine plain decoding may be all that pays
        assert f"{share}{proposed} draft tokens accepted" in err
        record = json.loads(dlm(*words, *options, "--lossless", "--json")[1])
        assert record["sampler"] == chosen
        assert record["forwards"] == 40 - record["accepted"]
        assert dlm("show", "run.traj")[:2] == (0, base)
    assert "is for autoregressive" in dlm.told("generate", "--model", str(masked_dir), "--lossless")
    assert "leave --sampler" in dlm.told(*words, "--lossless", "--sampler", "lookup")


@pytest.mark.slow
def test_bad_words_are_told(dlm: Dlm, autoregressive_dir: Path, masked_dir: Path, tmp_path: Path) -> None:
    make_model("autoregressive", alphabet="zyx").save_pretrained(tmp_path / "other")
    words = ("generate", "--model", str(autoregressive_dir), "--sampler")
    for bad in ("strided:4x2", "strided:4x65", "strided:autox8"):
        assert "STRIDExCANDIDATES has stride - 1" in dlm.told(*words, bad), bad
    for bad in (
        "lookup:4x8",
        "strided:4x",
        "lookup:0",
        "lookup:x",
        "strided:4,x",
        "strided:4,0.1,1",
        "strided:Auto",
        "draft",
        "draft:",
        "draft:a,b",
    ):
        assert "stride, floor" in dlm.told(*words, bad), bad
    assert "floor of a draft must be at least 0 and at most 1" in dlm.told(*words, "lookup:4,2")
    assert "must be autoregressive" in dlm.told(*words, f"draft:{masked_dir}")
    assert "another vocabulary" in dlm.told(*words, f"draft:{tmp_path / 'other'}")
    assert "against a cache" in dlm.told(*words, "lookup", "--cache", "none")
    assert "needs a diffusion model; it can use: autoregressive, block, strided, lookup, draft, heads" in dlm.told(*words, "topk")
    assert "needs a diffusion model" in dlm.told(*words, "lookup", "--block-length", "4")
    assert "needs an autoregressive model" in dlm.told("generate", "--model", str(masked_dir), "--sampler", "lookup")
