"""A TrainConfig takes words and objects, says what does not fit, and is resolved before the first step."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import dlm
from dlm.errors import InputError
from dlm.noise import process, schedule
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import Cosine, Geometric, Linear, Polynomial
from dlm.noise.uniform import UniformNoise
from dlm.protocols import NoiseSchedule
from dlm.train.config import TrainConfig
from dlm.train.loop import quiet
from dlm.train.setup import resolve
from dlm.train.training import Training
from dlm.workflows.fit import fit
from train import tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def ids(text: Path) -> int:
    """Size of the vocabulary with the mask, which is the last id."""
    return len(set(text.read_text())) + 1


@dataclass(frozen=True)
class Frequent(UniformNoise):
    """Noise of one's own with settings that config.json has to keep."""

    pace: float = 1.0
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plain:
    """Nothing but the protocol: no class of dlm's below it. It does what masked noise does."""

    vocab_size: int
    mask_id: int
    schedule: NoiseSchedule

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in (
            "nll",
            "kl",
            "corrupt_count",
            "next_cost",
            "uniform_order",
            "revealed_at",
        ):  # none of the protocol's
            raise AttributeError(name)
        return getattr(MaskedNoise(self.vocab_size, self.mask_id, self.schedule), name)


@dataclass(frozen=True)
class Late:
    """A schedule of one's own: 1 - t^power."""

    power: float = 3.0

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t**self.power

    def dalpha(self, t: torch.Tensor) -> torch.Tensor:
        return -self.power * t ** (self.power - 1)

    def inverse(self, alpha: torch.Tensor) -> torch.Tensor:
        return (1 - alpha) ** (1 / self.power)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names for all of these, which go again."""
    monkeypatch.setattr(process, "PROCESSES", dict(process.PROCESSES))
    monkeypatch.setattr(process, "SETTING", dict(process.SETTING))
    monkeypatch.setattr(schedule, "SCHEDULES", dict(schedule.SCHEDULES))
    process.register_noise("frequent", Frequent, setting="pace")
    process.register_noise("plain", Plain)
    schedule.register("late", Late)


SHORT = ("steps=4", "log_every=2", "eval_every=4")


def train(text: Path, out: Path, **changes: Any) -> dlm.LanguageModel:
    fit(replace(tiny.config(text, *SHORT), **changes), out, progress=quiet)
    return dlm.load(str(out))


def test_a_class_is_its_name(text: Path) -> None:
    assert TrainConfig(noise=dlm.UniformNoise).noise == "uniform"
    assert replace(tiny.config(text), noise=dlm.HybridNoise).estimate == "counted"


def test_objects_train_what_their_words_train(text: Path, ids: int, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "words", *SHORT, "noise=hybrid:0.3", "noise_schedule=cosine")
    noise = dlm.HybridNoise(ids, ids - 1, Cosine(), share=0.3)
    model = train(text, tmp_path / "objects", noise=noise)
    tiny.assert_same(tmp_path / "words", tmp_path / "objects")
    assert model.noise == noise
    fit(replace(tiny.config(text, *SHORT), noise=noise, steps=5), tmp_path / "objects", resume=True, progress=quiet)


def test_a_schedule_object(text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "words", *SHORT, "noise_schedule=geometric:1e-4,20")
    train(text, tmp_path / "objects", noise_schedule=Geometric(1e-4, 20))
    tiny.assert_same(tmp_path / "words", tmp_path / "objects")
    assert schedule.word(Polynomial(2)) == "polynomial:2.0"
    assert all(schedule.parse(schedule.word(one)) == one for one in (Linear(), Polynomial(3), Geometric(1e-3, 5)))


@pytest.mark.usefixtures("registered")
def test_noise_of_ones_own_trains_resumes_and_loads(text: Path, ids: int, tmp_path: Path) -> None:
    noise = Frequent(ids, ids - 1, Late(2.0), pace=0.5, order=(1, 2))
    model = train(text, tmp_path / "run", noise=noise)
    assert model.noise == noise
    assert json.loads((tmp_path / "run" / "config.json").read_text())["noise"] == {
        "process": "frequent",
        "schedule": "late:2.0",
        "head": "leave-one-out",
        "pace": 0.5,
        "order": [1, 2],
    }
    fit(replace(tiny.config(text, *SHORT), noise=noise, steps=5), tmp_path / "run", resume=True, progress=quiet)
    assert train(text, tmp_path / "word", noise="frequent:0.25").noise == Frequent(ids, ids - 1, Linear(), pace=0.25)


@pytest.mark.usefixtures("registered")
def test_a_process_needs_no_more_than_the_protocol(text: Path, ids: int, tmp_path: Path) -> None:
    config = replace(tiny.config(text, *SHORT), noise=Plain)
    assert config.estimate == "continuous"
    fit(config, tmp_path / "plain", progress=quiet)
    tiny.run(text, tmp_path / "masked", *SHORT, "estimator=continuous")
    assert tiny.curve(tmp_path / "plain") == tiny.curve(tmp_path / "masked")
    with pytest.raises(InputError, match="plain noise has no estimator any_order"):
        replace(config, estimator="any_order")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": Frequent(9, 8)}, "Frequent has no name: dlm.noise.process.register_noise"),
        ({"noise": Frequent}, "Frequent has no name"),
        ({"noise_schedule": Late()}, "Late has no name: dlm.noise.schedule.register"),
        ({"noise": UniformNoise(9, 8, Late())}, "Late has no name"),
        ({"noise": UniformNoise(9, 8), "noise_schedule": "cosine"}, "has a schedule of its own: leave noise_schedule away"),
        ({"noise": UniformNoise(9, 8, Geometric()), "estimator": "counted"}, "the geometric:1e-05,20.0 schedule does not run from 1 to 0"),
        ({"noise": "unifrom"}, r"unknown noise 'unifrom'; did you mean uniform\? known: masked"),
        ({"noise_schedule": "cosin"}, r"did you mean cosine\?"),
        ({"optimizer": "adam"}, r"unknown optimizer 'adam'; did you mean adamw\? known: adamw, muon"),
    ],
)
def test_objects_and_words_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        replace(tiny.CONFIG, **changes)
    assert "\n" not in str(error.value)


def test_noise_for_another_vocabulary(text: Path, ids: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"for 9 ids with mask 8, this run has {ids} with mask {ids - 1}: make it with those"):
        train(text, tmp_path / "run", noise=UniformNoise(9, 8))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("width=128", "6 heads of width 128 have an odd head_dim of 21, which must be even: width=120 or 132, or heads=4 or 8 fits"),
        ("heads=7", "7 heads of width 192 have an odd head_dim of 27, which must be even: width=182 or 196, or heads=6 or 8 fits"),
        ("width=5 heads=5", "5 heads of width 5 have an odd head_dim of 1, which must be even: width=10 fits"),
        ("width=7 heads=9", "head_dim must be at least 1, got 0"),
        ("stpes=3", r"did you mean steps\? known keys are attention, "),
    ],
)
def test_sizes_and_keys_that_would_fit_are_named(words: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^--set {words}: {message}") as error:
        TrainConfig().with_settings(words.split())
    assert "\n" not in str(error.value)
    for fitting in ("width=120", "width=132", "width=128 heads=4", "width=128 heads=8", "heads=7 width=182", "width=10 heads=5"):
        TrainConfig().with_settings(fitting.split())


@pytest.mark.parametrize("words", ["noise=masked", "noise=hybrid:0.3", "attention=block_causal block_length=8", "objective=autoregressive"])
def test_no_word_is_parsed_inside_a_step(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    config = tiny.config(text, *words.split())
    task = Training(config, resolve(config), Accelerator(cpu=True), tmp_path, {})

    def parse(*_: object) -> Any:
        raise AssertionError("a word is parsed inside a step")

    for module in (schedule, process):
        monkeypatch.setattr(module, "parse", parse)
    assert task.update(0).nats.isfinite()
    assert task.validate(1).figures["val_nats"] > 0
