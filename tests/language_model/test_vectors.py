"""A model with noise on vectors from training to text: trained, resumed, saved, loaded, evaluated, sampled; what it cannot do is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dlm
from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.sampling.diffusion.unmasking import TopScore
from dlm.workflows.evaluate import evaluate
from train import tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "gaussian"
    tiny.run(text, out, "noise=gaussian")
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> LanguageModel:
    return dlm.load(str(run))


def test_a_stopped_run_ends_as_one_that_was_not(run: Path, text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "parts", "noise=gaussian", stop_after=7)
    tiny.run(text, tmp_path / "parts", "noise=gaussian", resume=True)
    tiny.assert_same(run, tmp_path / "parts")


def test_its_bound_is_the_sum_of_three_parts(model: LanguageModel, text: Path) -> None:
    found = evaluate(model, text, passes=2, max_windows=4)
    assert found.parts is not None
    assert found.parts.keys() == {"prior", "diffusion", "reconstruction"}
    assert sum(found.parts.values()) == pytest.approx(found.nats_per_token, rel=1e-6)
    assert found.parts["prior"] == 0 < found.parts["reconstruction"] < 0.01
    assert found.is_bound
    assert found.record()["parts"] == found.parts
    with pytest.raises(InputError, match="noise on vectors has one estimator, --estimator continuous"):
        evaluate(model, text, estimator="counted")


@pytest.mark.parametrize("sampler", ["ancestral", "flow"])
def test_text_with_a_prompt_a_suffix_and_more_than_a_window(model: LanguageModel, sampler: str) -> None:
    found = model.generate("the quick ", length=50, suffix=" dog", sampler=sampler, steps=5, seed=3)
    assert found.text.startswith("the quick ")
    assert found.text.endswith(" dog")
    assert len(found.text) == 50
    assert found.trajectory.has_blends
    assert found.forwards == 5 * 2  # two windows
    assert model.generate("the quick ", length=50, suffix=" dog", sampler=sampler, steps=5, seed=3).text == found.text


def test_given_tokens_are_read_as_they_are(model: LanguageModel) -> None:
    x_BT = torch.arange(32)[None] % 10
    e_BTV = model.noise.certain(x_BT, torch.zeros(1))  # type: ignore[union-attr]
    plain = model.network(x_BT).float()
    assert torch.allclose(model.predict(e_BTV, torch.zeros(1)), plain, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "topk"}, "needs masked noise; this model has gaussian noise and can use: ancestral, flow"),
        ({"cache": "prefix"}, "no token before the last step: leave blocks away"),
        ({"block_length": 8}, "leave blocks away"),
        ({"allow": "abc"}, "leave a constraint away"),
        ({"pattern": "a+"}, "leave a constraint away"),
        ({"greedy_tail": 2}, "leave a greedy tail away"),
        ({"until_settled": 2}, "leave until_settled away"),
        ({"guidance": 2.0}, "guidance needs a bidirectional masked model"),
        ({"rule": TopScore()}, "the rule TopScore needs masked noise"),
    ],
)
def test_options_of_samplers_of_tokens_are_refused(model: LanguageModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.sampler(**options)


@pytest.mark.parametrize("settings", [("attention=block_causal", "block_length=8"), ("objective=autoregressive", "attention=causal")])
def test_training_refuses_causal_networks(settings: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"masked noise without|needs a bidirectional diffusion model: leave objective and attention away"):
        tiny.CONFIG.with_settings(["noise=gaussian", *settings])
