"""Runs that learn the weights of their noise: what they save, keep and refuse, and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dlm
from conftest import Dlm
from dlm.errors import InputError
from dlm.noise.ordered import OrderedNoise
from dlm.train import setup
from dlm.train.objective import RowsOf
from dlm.workflows.order import learned_order
from train import tiny

GENMD4 = ("noise=genmd4", "time_conditioning=true")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def ordered(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ordered") / "run"
    tiny.run(text, out, "noise=ordered", "noise_lr=0.1")
    return out


@pytest.fixture(scope="module")
def genmd4(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("genmd4") / "run"
    tiny.run(text, out, *GENMD4)
    return out


def weights(out: Path) -> torch.Tensor:
    return torch.tensor(json.loads((out / "config.json").read_text())["noise"]["weights"], dtype=torch.float64)


def test_the_averaged_weights_are_saved_to_the_bit(ordered: Path, genmd4: Path) -> None:
    for out, count in ((ordered, 32), (genmd4, None)):
        average = tiny.tensors(out)["noise.average"]
        network = dlm.load(str(out)).config.network
        assert len(weights(out)) == (count or network.vocab_size)
        kept = average if count else average[:-1]  # the mask is the last id
        assert torch.equal(weights(out), (average - kept.mean()).exp())
        assert weights(out)[: len(kept)].log().std() > 0.01
        assert not torch.equal(average, tiny.tensors(out)["noise.log_weights"])


def test_weights_that_are_held_stay_and_leave_masked_noise(text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "held", "noise=ordered", "noise_lr=0", "steps=3")
    assert (weights(tmp_path / "held") == 1).all()
    held = dlm.load(str(tmp_path / "held"))
    plain = json.loads((tmp_path / "held" / "config.json").read_text())
    plain["noise"] = {"process": "masked", "schedule": "linear"}
    (tmp_path / "held" / "config.json").write_text(json.dumps(plain))
    bounds = [dlm.evaluate(model, text, passes=2, max_windows=3).nats_per_token for model in (held, str(tmp_path / "held"))]
    assert bounds[0] == bounds[1]
    assert held.generate(length=20, seed=3).text == dlm.load(str(tmp_path / "held")).generate(length=20, seed=3).text


def test_weights_begin_where_a_process_has_them(text: Path, tmp_path: Path) -> None:
    given = tuple(0.9**i for i in range(32))
    size = setup.resolve(tiny.config(text)).network.vocab_size
    config = dlm.TrainConfig(**(vars(tiny.config(text, "steps=2", "noise_lr=0")) | {"noise": OrderedNoise(size, size - 1, weights=given)}))
    dlm.fit(config, tmp_path / "run", progress=lambda _: None)
    assert torch.allclose(weights(tmp_path / "run").log().diff(), torch.tensor(0.9, dtype=torch.float64).log().expand(31))


def test_rows_of_a_batch_are_ordered_as_in_the_whole_batch() -> None:
    noise = OrderedNoise(5, 4, weights=tuple(range(1, 9)))
    x_BT, count_B = torch.zeros(6, 8, dtype=torch.long), torch.arange(1, 7)
    free_BT = torch.ones_like(x_BT, dtype=torch.bool)
    whole = noise.corrupt_order(x_BT, count_B, free_BT, torch.Generator().manual_seed(0))
    for own in (slice(0, 3), slice(3, 6)):
        rows: Any = RowsOf(noise, batch=6, own=own)
        found = rows.corrupt_order(x_BT[own], count_B[own], free_BT[own], torch.Generator().manual_seed(0))
        assert all(torch.equal(part, expected[own]) for part, expected in zip(found, whole, strict=True))


@pytest.mark.parametrize("sampler", ["ancestral", "first-hitting", "predictor-corrector", "speculative:2", "topk"])
def test_samplers_write_texts_of_an_ordered_model(ordered: Path, sampler: str) -> None:
    assert len(dlm.load(str(ordered)).generate("the", length=40, sampler=sampler, steps=6, seed=0).text) == 40


def test_genmd4_writes_and_is_measured(genmd4: Path, text: Path) -> None:
    model = dlm.load(str(genmd4))
    assert len(model.generate("the", length=40, steps=6, seed=0).text) == 40
    found = dlm.evaluate(model, text, passes=4, max_windows=4)
    assert found.estimator == "continuous"
    assert 1 < found.nats_per_token < 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("noise=ordered", "time_conditioning=true"), "does not read the time: --set time_conditioning=false"),
        (("noise=genmd4",), "reads the time: --set time_conditioning=true"),
        (("noise=ordered", "batch=3"), "batch must be even, got 3"),
        (("noise=ordered", "levels=0.5,1"), "its own loss"),
        (("noise=ordered", "noise_lr=-1"), "noise_lr must be at least 0"),
        ((*GENMD4, "estimator=continuous"), "its own loss"),
    ],
)
def test_settings_that_cannot_be(text: Path, settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiny.config(text, *settings)


def test_a_schedule_with_an_end_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="from exactly 1 to exactly 0"):
        tiny.run(text, tmp_path / "run", "noise=ordered", "noise_schedule=log-linear")


def test_a_model_whose_weights_do_not_fit_is_refused(ordered: Path, tmp_path: Path) -> None:
    config = json.loads((ordered / "config.json").read_text())
    config["noise"]["weights"] = config["noise"]["weights"][:5]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in ("model.safetensors", "tokenizer.json"):
        (tmp_path / file).write_bytes((ordered / file).read_bytes())
    with pytest.raises(InputError, match="5 weights, for windows of 32 there are 32"):
        dlm.load(str(tmp_path))


def test_prices_of_random_orders_are_refused(ordered: Path, text: Path) -> None:
    with pytest.raises(InputError, match="learned an order"):
        dlm.curse(dlm.load(str(ordered)), text, tokens_per_step=[1, 2])


def test_show(ordered: Path, genmd4: Path, tmp_path: Path) -> None:
    found = learned_order(str(ordered))
    assert (found.process, found.what, len(found.places)) == ("ordered", "position", 32)
    assert [one.label for one in found.places[:3]] == ["0", "1", "2"]
    assert found.first[0].weight == weights(ordered).max()
    assert all(one.half == pytest.approx(0.5 ** (1 / one.weight)) for one in found.places)
    tokens = learned_order(str(genmd4))
    assert (tokens.process, tokens.what) == ("genmd4", "token")
    assert {one.label for one in tokens.places} >= {"a", " ", "\n"}
    with pytest.raises(InputError, match="no learned weights"):
        learned_order("shakespeare-mask-1")


def test_the_verb_shows_a_table_a_picture_and_json(dlm: Dlm, genmd4: Path, ordered: Path, tmp_path: Path) -> None:
    code, out, _ = dlm("show", str(genmd4), "--plot", "weights.png")
    assert code == 0
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
    first = learned_order(str(genmd4)).first[0]
    assert out.splitlines()[1].split()[-2:] == [f"{first.weight:.3f}", f"{first.half:.3f}"]
    code, out, _ = dlm("show", str(ordered), "--json")
    assert code == 0
    assert len(json.loads(out)["places"]) == 32
    assert "--html and --gif replay runs" in dlm.told("show", str(ordered), "--gif", "run.gif")
    (tmp_path / "run.traj").touch()
    assert "one model" in dlm.told("show", "run.traj", "--plot", "weights.png")
    assert "a .png, .svg or .pdf file" in dlm.told("show", str(ordered), "--plot", "weights.txt")
