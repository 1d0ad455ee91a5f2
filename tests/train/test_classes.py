"""Noise of classes end to end: a checkpoint, the two parts of the bound, class tokens in a run, class files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dlm
from dlm.cli.app import app
from dlm.errors import InputError
from dlm.evaluation import likelihood
from dlm.noise import clusters, process
from dlm.noise.classes import ClassNoise
from dlm.text.tokenizer import Tokenizer
from dlm.train import setup
from dlm.train.data import Stream
from dlm.viz.html import write_html
from train import tiny

TINY_RUN = ("noise=classes:3", "steps=4", "window=16", "context=0")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classes") / "run"
    tiny.run(text, out, *TINY_RUN)
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> dlm.LanguageModel:
    return dlm.load(str(run))


def test_the_vocabulary_grows_by_the_classes(run: Path, model: dlm.LanguageModel) -> None:
    noise = model.noise
    assert isinstance(noise, ClassNoise)
    words = model.tokenizer.vocab_size
    assert (noise.mask_id, noise.lead) == (words, 3.0)
    assert noise.clusters == tuple(clusters.classes([model.tokenizer.piece(token) for token in range(words)]))
    assert model.config.network.vocab_size == model.tokenizer.ids == words + 1 + noise.classes
    assert len(set(noise.names)) == noise.classes
    assert [model.tokenizer.spelling.alone(words + 1 + c) for c in range(noise.classes)] == list(noise.names)


def test_a_run_resumes_to_the_bit(text: Path, run: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "parts", *TINY_RUN, stop_after=2)
    tiny.run(text, tmp_path / "parts", *TINY_RUN, resume=True)
    tiny.assert_same(run, tmp_path / "parts")


def test_the_parts_add_up_to_the_bound_of_the_other_estimator(model: dlm.LanguageModel, text: Path) -> None:
    windows_WT = Stream.encode([text.read_text()], model.tokenizer, model.window).windows(64)
    one, other = (
        likelihood.evaluate(model.noise, model.predict, windows_WT, characters=windows_WT.numel(), estimator=estimator, passes=passes)
        for estimator, passes in (("auto", 4), ("continuous", 16))
    )
    assert one.estimator == "two-clocks"
    assert one.parts is not None
    assert sum(one.parts.values()) == pytest.approx(one.nats_per_token)
    assert min(one.parts.values()) > 0
    assert abs(one.nats_per_token - other.nats_per_token) < 4 * (one.stderr + other.stderr)
    assert one.stderr < other.stderr


@pytest.mark.parametrize("sampler", ["ancestral", "classes-first:0.5", "classes-first:1"])
def test_a_run_shows_classes_and_then_words(model: dlm.LanguageModel, tmp_path: Path, sampler: str) -> None:
    noise = model.noise
    assert isinstance(noise, ClassNoise)
    made = model.generate("the ", length=24, steps=8, sampler=sampler, seed=0)
    assert len(made.text) == 24
    assert made.trajectory is not None
    frames = list(made.trajectory.frames())
    shown = [frame.tokens_BT > noise.mask_id for frame in frames]
    assert any(bool(one.any()) for one in shown)
    assert not bool(shown[-1].any())
    for frame, classes_BT in zip(frames, shown, strict=True):
        assert not bool((classes_BT & frame.settled_BT).any())
    k = next(k for k, one in enumerate(shown) if bool(one.any()))
    at = int(shown[k][0].int().argmax())
    drawn = made.trajectory.shown(0, frames[k].tokens_BT[0])[at]
    assert drawn in noise.names
    write_html([("classes", made.trajectory)], tmp_path / "page.html")
    assert json.dumps(drawn, ensure_ascii=False) in (tmp_path / "page.html").read_text()


def test_rows_of_a_batch_are_those_alone(model: dlm.LanguageModel) -> None:
    both = model.generate(["the ", "a "], length=20, steps=6, seed=5)
    alone = model.generate("a ", length=20, steps=6, seed=6)
    assert both[1].text == alone.text


def test_allowed_tokens_hold_and_patterns_are_refused(model: dlm.LanguageModel) -> None:
    text = model.generate("", length=20, steps=6, allow="abe ", seed=0).text
    assert set(text) <= set("abe ")
    with pytest.raises(InputError, match="a pattern needs masked noise"):
        model.generate("", length=8, steps=4, pattern="[a-e]+", seed=0)


def test_the_command_line(run: Path, text: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    card = tmp_path / "card.json"
    words = ["eval", str(run), "--data", str(text), "--max-windows", "2", "--passes", "2", "--card", str(card), "--json"]
    found = runner.invoke(app, words)
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout.splitlines()[-1])
    assert list(record["parts"]) == ["class", "word given class"]
    assert sum(record["parts"].values()) == pytest.approx(record["nats_per_token"])
    found = runner.invoke(app, ["generate", "--model", str(run), "the ", "--length", "8", "--steps", "4", "--sampler", "classes-first"])
    assert found.exit_code == 0, found.output


def test_names_are_the_commonest_words() -> None:
    tokenizer = Tokenizer.characters("ab c\n")  # newline, space, a, b, c
    stream = Stream(np.array([2, 3, 3, 1, 1, 0], dtype=np.int32), 2)
    assert setup.names_of([0, 0, 1, 1, 2], tokenizer, stream) == [" ~", "b~", "c~"]


def test_shuffled_classes_have_the_same_sizes(text: Path) -> None:
    tokenizer = Tokenizer.make("chars", text.read_text())
    one, other = (setup.cluster_of(source, tokenizer) for source in ("classes", "shuffled:classes"))
    assert one != other
    assert sorted(map(one.count, set(one))) == sorted(map(other.count, set(other)))
    assert other == setup.cluster_of("shuffled:classes", tokenizer)
    assert other == clusters.renumber(other)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["a", "b"]], "puts [0-9]+ tokens in no group"),
        ([["a"], ["a", "b"]], "puts 'a' in several groups"),
        ({"a": 1}, "puts [0-9]+ tokens in no group"),
        (3, "does not hold a list of groups"),
    ],
)
def test_a_class_file_that_does_not_fit_is_one_line(text: Path, tmp_path: Path, groups: Any, message: str) -> None:
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(groups))
    with pytest.raises(InputError, match=message) as error:
        tiny.run(text, tmp_path / "run", "noise=classes", f"clusters={path}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("noise=classes:0.5",), "--noise classes:0.5: .* at least 1"),
        (("noise=classes", "noise_schedule=log-linear"), "from exactly 1 to exactly 0"),
        (("noise=classes", "estimator=any_order"), "classes noise has no estimator any_order"),
        (("noise=masked", "estimator=two_clocks"), "masked noise has no estimator two_clocks"),
        (("noise=classes", "clusters=shuffled:nothing"), "neither `classes`, a JSON file, nor MODEL:COUNT"),
    ],
)
def test_what_does_not_fit_is_told(text: Path, tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        tiny.run(text, tmp_path / "run", *settings)
    assert "\n" not in str(error.value)


def test_the_estimator_and_the_weights_follow_the_noise(text: Path) -> None:
    found = tiny.config(text, "noise=classes")
    assert (found.estimate, found.equal_steps) == ("two_clocks", found.steps)
    assert tiny.config(text, "noise=classes", "time_conditioning=true").estimate == "continuous"


def test_a_process_of_ones_own_vocabulary_is_checked(text: Path, tmp_path: Path) -> None:
    made = process.make({"process": "classes", "clusters": [0, 1]}, 5, 2)
    config = tiny.config(text, "steps=2")
    with pytest.raises(InputError, match="the noise is for 5 ids with mask 2"):
        dlm.fit(type(config)(**{**config.__dict__, "noise": made}), tmp_path / "run")


def test_classes_begin_as_the_mean_of_their_words(text: Path, tmp_path: Path) -> None:
    size = ("steps=1", "lr=1e-9", "ema=0", "window=16", "context=0")
    tiny.run(text, tmp_path / "masked", *size)
    tiny.run(text, tmp_path / "classes", "noise=classes", f"init={tmp_path / 'masked'}", *size)
    before, after = (dlm.load(str(tmp_path / name)) for name in ("masked", "classes"))
    noise, own_VD = after.noise, after.network.embed.weight
    assert isinstance(noise, ClassNoise)
    assert torch.allclose(own_VD[: noise.mask_id + 1], before.network.embed.weight, atol=1e-6)
    for c in range(noise.classes):
        words = [v for v, of in enumerate(noise.clusters) if of == c]
        assert torch.allclose(own_VD[noise.mask_id + 1 + c], own_VD[words].mean(0), atol=1e-6)
    for name, weight in before.network.blocks.state_dict().items():
        assert torch.allclose(weight, after.network.blocks.state_dict()[name], atol=1e-6)


def test_class_tokens_get_no_probability(model: dlm.LanguageModel) -> None:
    noise = model.noise
    assert isinstance(noise, ClassNoise)
    z_BT = torch.full((1, model.window), noise.mask_id)
    logp_BTV = noise.log_probs(model.predict(z_BT, torch.ones(1)), z_BT)
    assert (logp_BTV[..., noise.mask_id :] == -torch.inf).all()
    assert torch.allclose(logp_BTV.exp().sum(-1), torch.ones(1, model.window))


def test_a_process_as_an_object_gets_names(text: Path, tmp_path: Path) -> None:
    words = Tokenizer.make("chars", text.read_text()).vocab_size
    made = process.make({"process": "classes", "clusters": [token % 3 for token in range(words)]}, words + 4, words)
    config = tiny.config(text, "steps=1", "window=16", "context=0")
    dlm.fit(type(config)(**{**config.__dict__, "noise": made}), tmp_path / "run")
    found = dlm.load(str(tmp_path / "run")).noise
    assert isinstance(found, ClassNoise)
    assert found.clusters == tuple(token % 3 for token in range(words))
    assert len(set(found.names)) == 3
