"""Many tokens a call from the command line: block diffusion, caches, guidance, constraints, calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Dlm, make_model
from dlm.errors import InputError
from dlm.language_model import load
from dlm.sampling import registry
from dlm.sampling.diffusion.constraints import AllowedTokens
from dlm.sampling.diffusion.guidance import Classifier
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.draw import generators


@pytest.fixture
def masked(tmp_path: Path) -> str:
    make_model().save_pretrained(tmp_path / "masked")
    return str(tmp_path / "masked")


@pytest.fixture
def blocked(tmp_path: Path) -> str:
    make_model(attention="block_causal", block_length=8).save_pretrained(tmp_path / "blocked")
    return str(tmp_path / "blocked")


@pytest.fixture
def twin(tmp_path: Path) -> str:
    make_model("autoregressive").save_pretrained(tmp_path / "twin")
    return str(tmp_path / "twin")


@pytest.mark.parametrize("word", [*(one.name for one in registry.known("masked")), "speculative:3", "speculative:3,0.2"])
def test_every_sampler_writes_a_long_text(dlm: Dlm, masked: str, word: str) -> None:
    code, out, err = dlm("generate", "Ab", "--model", masked, "--sampler", word, "--length", "70", "--steps", "8", "--json")
    result = json.loads(out.splitlines()[-1])
    assert (code, len(result["text"]), result["tokens"]) == (0, 70, 68), err
    assert result["text"].startswith("Ab")


@pytest.mark.parametrize("cache", ["prefix", "dual", "delayed:4", "drift:0.2"])
def test_caches(dlm: Dlm, masked: str, cache: str) -> None:
    words = ["generate", "Ab", "--model", masked, "--length", "70", "--steps", "8", "--cache", cache, "--block-length", "8"]
    code, out, err = dlm(*words)
    assert code == 0, err
    assert len(out) == 71


def test_block_diffusion_with_and_without_its_cache(blocked: str) -> None:
    model = load(blocked)
    for length in (None, 1, 4, 16, 32):  # the context of 8 is cut down to whole blocks
        cached = model.generate("Ab", length=70, steps=16, block_length=length)
        plain = model.generate("Ab", length=70, steps=16, block_length=length, cache=False)
        assert cached.text == plain.text
        assert len(cached.text) == 70


def test_block_diffusion_is_trained_measured_and_sampled(dlm: Dlm, text_file: Path) -> None:
    sizes = "layers=2,heads=2,width=32,window=32,context=8,batch=4,steps=4,warmup=1,eval_windows=8,attention=block_causal,block_length=8"
    words = [word for size in sizes.split(",") for word in ("--set", size)]
    code, _, err = dlm("train", "--data", str(text_file), "--out", "run", *words, "--set", "block_lengths=1,8,32")
    assert code == 0, err
    code, out, err = dlm("eval", "run", "--data", str(text_file), "--block-lengths", "1,8,32", "--max-windows", "4", "--json")
    rows = json.loads(out.splitlines()[-1])["block_lengths"]
    assert [(row["block_length"], row["is_bound"]) for row in rows] == [(1, False), (8, True), (32, True)]
    assert rows[0]["stderr"] == 0
    assert all(2 < row["nats_per_token"] < 6 for row in rows)
    code, out, err = dlm("generate", "ROMEO", "--model", "run", "--length", "100", "--steps", "8")
    assert (code, len(out)) == (0, 101), err


def test_guidance_makes_the_prompt_count(masked: str) -> None:
    model = load(masked)
    plain, strong = (model.generate("Abcdefgh", length=24, steps=8, guidance=g).text for g in (1.0, 4.0))
    assert plain != strong
    assert model.generate("", length=24, steps=8, guidance=4.0).text == model.generate("", length=24, steps=8).text


def test_constraints(dlm: Dlm, masked: str) -> None:
    code, out, err = dlm("generate", "Ab", "--model", masked, "--allow", "xyz\n", "--length", "40", "--sampler", "topk", "--steps", "4")
    assert code == 0, err
    assert set(out[2:]) <= set("xyz\n")
    pattern = "Ab: ([a-z]+ )+(yes|no)[.]"
    for sampler in ("ancestral", "topk", "confidence:0.1"):
        words = ["generate", "Ab", "--model", masked, "--pattern", pattern, "--length", "40", "--sampler", sampler, "--steps", "6"]
        code, out, err = dlm(*words)
        assert code == 0, err
        assert out.endswith((" yes.\n", " no.\n"))
        assert out.startswith("Ab: ")
    code, out, _ = dlm("generate", "Ab", "--model", masked, "--pattern", pattern, "--allow", "yes :.no", "--length", "40")
    assert set(out[2:]) <= set("yes :.no\n")


def test_calibrate_then_auto(dlm: Dlm, masked: str, twin: str) -> None:
    told = dlm.told("generate", "--model", masked, "--sampler", "auto")
    assert "dlm calibrate" in told
    code, out, err = dlm("calibrate", masked, "--judge", twin, "--quick", "--samples", "2", "--json")
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["exact"] for row in rows] == [True, False, False]
    assert all(row["seconds"] > 0 and row["calls"] > 0 and row["bits"] > 1 for row in rows)
    code, out, err = dlm("generate", "--model", masked, "--sampler", "auto", "--budget", "calls:32", "--json")
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    assert record["forwards"] <= 32
    assert record["sampler"] in ("topk", "first-hitting")  # what was chosen, not that something was
    code, out, err = dlm("generate", "--model", masked, "--sampler", "auto", "--budget", "calls:32", "--allow", "abc", "--length", "20")
    assert (code, set(out) <= set("abc\n")) == (0, True), err
    code, out, err = dlm("calibrate", masked, "--judge", twin, "--retime", "--samples", "2", "--json")
    timed = json.loads(out.splitlines()[-1])["rows"]
    assert (code, [row | {"seconds": 0} for row in timed]) == (0, [row | {"seconds": 0} for row in rows]), err
    assert all(row["seconds"] > 0 for row in timed)
    assert "calls" in dlm.told("generate", "--model", masked, "--sampler", "auto", "--budget", "calls:1")
    assert "budget" in dlm.told("generate", "--model", masked, "--sampler", "auto", "--budget", "much")
    assert "budget" in dlm.told("generate", "--model", masked, "--budget", "calls:3")
    assert "auto" in dlm.told("generate", "--model", masked, "--sampler", "auto", "--steps", "3")


BAD: list[tuple[str, str, str]] = [
    ("masked", "--block-length 5", "divide"),
    ("masked", "--cache fridge", "known"),
    ("masked", "--cache dual:3", "setting"),
    ("masked", "--cache dual --sampler revoke", "combined"),
    ("masked", "--guidance 2 --sampler revoke", "combined"),
    ("masked", "--sampler speculative --cache dual", "speculative"),
    ("masked", "--sampler speculative:0", "draft tokens"),
    ("masked", "--sampler speculative:x", "speculative:TOKENS:TOLERANCE"),
    ("masked", "--sampler speculative:4,-1", "tolerance"),
    ("masked", "--guidance -1", "guidance"),
    ("masked", "--guidance nan", "guidance"),
    ("masked", "--allow 0123", "token"),
    ("masked", "--pattern [a", "expression"),
    ("masked", "--pattern [0-9]+ --length 20", ""),
    ("masked", "--pattern abc --length 20", ""),
    ("masked", "--pattern a+ --length 20 --sampler remdm-cap", "once"),
    ("masked", "--sampler factor:0", "factor"),
    ("masked", "--sampler entropy-bound:-1", "bound"),
    ("masked", "--sampler remdm-cap:2", "eta"),
    ("masked", "--sampler margin:2", "setting"),
    ("blocked", "--cache dual", "exact cache"),
    ("blocked", "--sampler revoke", "bidirectional"),
    ("blocked", "--sampler planner --cache none", "bidirectional"),
    ("blocked", "--guidance 2", "guidance needs"),
    ("masked", "--sampler auto --cache none", "leave them away"),
    ("twin", "--sampler auto", "no masked diffusion model"),
    ("blocked", "--suffix end", "suffix"),
    ("blocked", "--template a_______________________________________________________________z", "suffix"),
    ("blocked", "--sampler speculative --suffix end", "suffix"),
    ("blocked", "--block-length 5", "divide"),
    ("twin", "--cache dual", "diffusion"),
    ("twin", "--block-length 8", "diffusion"),
    ("twin", "--allow abc", "diffusion"),
]


@pytest.mark.parametrize(("model", "words", "said"), BAD, ids=[f"{m} {w}" for m, w, _ in BAD])
def test_bad_input_gets_one_line(dlm: Dlm, request: pytest.FixtureRequest, model: str, words: str, said: str) -> None:
    assert said in dlm.told("generate", "--model", request.getfixturevalue(model), *words.split(" "))


TRAIN: list[tuple[str, str]] = [
    ("attention=block_causal", "block_length"),
    ("attention=block_causal block_length=5", "divide"),
    ("attention=block_causal block_length=8 block_lengths=3", "divide"),
    ("block_lengths=8", "block_causal"),
    ("attention=block_causal block_length=8 noise=uniform", "masked"),
    ("attention=block_causal block_length=8 estimator=continuous", "estimator"),
    ("tokenizer=bpe:3", "merge"),
    ("tokenizer=bpe:60000", "more text"),
]


@pytest.mark.parametrize(("settings", "said"), TRAIN)
def test_bad_training_gets_one_line(dlm: Dlm, text_file: Path, settings: str, said: str) -> None:
    words = [word for setting in settings.split() for word in ("--set", setting)]
    assert said in dlm.told("train", "--data", str(text_file), "--out", "run", *words)


def test_bad_measurements_get_one_line(dlm: Dlm, text_file: Path, masked: str, blocked: str, twin: str) -> None:
    assert "block diffusion" in dlm.told("eval", masked, "--data", str(text_file), "--block-lengths", "4")
    assert "invalid value for '--estimator'" in dlm.told("eval", masked, "--data", str(text_file), "--estimator", "autoregressive")
    assert "its own" in dlm.told("eval", blocked, "--data", str(text_file), "--estimator", "continuous")
    assert "--card" in dlm.told("eval", blocked, "--data", str(text_file), "--block-lengths", "1,4", "--card", "c.json")
    assert "block diffusion" in dlm.told("curse", blocked, "--data", str(text_file))
    assert "one step" in dlm.told("curse", masked, "--data", str(text_file), "--sampler", "speculative")
    assert "--out" in dlm.told("calibrate", masked, "--judge", twin, "--out", str(text_file))
    assert "divide" in dlm.told("eval", blocked, "--data", str(text_file), "--block-lengths", "5")
    assert "whole numbers" in dlm.told("eval", blocked, "--data", str(text_file), "--block-lengths", "4,x")
    assert "autoregressive" in dlm.told("calibrate", masked, "--judge", masked, "--quick")
    assert "no masked diffusion model" in dlm.told("calibrate", twin, "--judge", twin, "--quick")
    assert "at least 2" in dlm.told("calibrate", masked, "--judge", twin, "--samples", "1")


def test_stopping_between_frames_leaves_a_whole_run(masked: str) -> None:
    model = load(masked)
    for options in ({"sampler": "speculative:3"}, {"cache": "dual", "block_length": 8}, {"sampler": "remdm-cap"}):
        run = model.trajectory(canvas := model.canvas("Ab", length=40))
        for n, frame in enumerate(model.stream(canvas=canvas, steps=16, **options)):
            run.append(frame)
            if n == 3:
                break
        states = list(run.frames())
        assert torch.equal(states[-1].tokens_BT, run.current_BT)
        assert len(states) == 5


def test_one_window_gives_json_that_everybody_reads(dlm: Dlm, text_file: Path, masked: str) -> None:
    code, out, err = dlm("eval", masked, "--data", str(text_file), "--max-windows", "1", "--card", "card.json", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1], parse_constant=pytest.fail)["stderr_data"] is None
    assert json.loads(Path("card.json").read_text(), parse_constant=pytest.fail)["figures"]["stderr_data"] is None


@pytest.mark.parametrize("sampler", ["ancestral", "predictor-corrector", "refine", "worst", "entropy-bound:2"])
@pytest.mark.parametrize("until_settled", [0, 1, 4])
def test_what_may_not_be_written_never_is_under_replacement_noise(sampler: str, until_settled: int) -> None:
    model = make_model(noise={"process": "uniform", "schedule": "linear"})
    options: dict[str, Any] = {"sampler": sampler, "until_settled": until_settled, "steps": 64, "allow": "abc", "max_new_tokens": 9}
    together = [made.text for made in model.generate(["Ab", "A longer one", ""], seed=4, **options)]
    assert all(set(text[-9:]) <= set("abc") for text in together)
    assert together == [model.generate(prompt, seed=4 + i, **options).text for i, prompt in enumerate(["Ab", "A longer one", ""])]


def test_a_broken_network_is_told(masked: str) -> None:
    model = load(masked)
    model.network.head.weight = torch.nn.Parameter(model.network.head.weight * torch.nan)
    for sampler in ("ancestral", "topk", "speculative"):
        with pytest.raises(InputError, match="nan"):
            model.generate("Ab", length=20, sampler=sampler)


def test_nothing_in_common_is_told(masked: str) -> None:
    model = load(masked)
    ids = model.tokenizer.encode("ab")

    def never(onehot_BTV: torch.Tensor) -> torch.Tensor:
        return torch.where(onehot_BTV[..., ids].sum((1, 2)) > 0, -torch.inf, 0.0)

    guidance = Classifier(never, 1.0, model.tokenizer.mask_id, exact=True)
    constraint = AllowedTokens(ids, model.noise.vocab_size)
    sampler = DiffusionSampler(model.network, model.noise, model.window, guidance=guidance, constraint=constraint)
    with pytest.raises(InputError, match="in common"):
        list(sampler.steps(model.canvas("", length=20), rng=generators(0, 1)))


def test_how_much_a_long_text_carries_over(dlm: Dlm, masked: str) -> None:
    """More context means more windows; what cannot be is told."""
    calls = {}
    for context in ("0", "16"):
        code, out, err = dlm("generate", "--model", masked, "--length", "96", "--steps", "4", "--context", context, "--json")
        assert code == 0, err
        calls[context] = json.loads(out.splitlines()[-1])["forwards"]
    assert calls["16"] > calls["0"]
    assert "context 99 must lie in" in dlm.told("generate", "--model", masked, "--length", "96", "--context", "99")
    assert "context -1 must lie in" in dlm.told("generate", "--model", masked, "--length", "96", "--context", "-1")
