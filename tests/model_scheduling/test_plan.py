from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlm.errors import InputError
from dlm.model_scheduling.plan import SHAPES, ModelSchedule


@pytest.mark.parametrize("text", ["L125 H750 L125", "L0.125 H0.75 L0.125", "H1.0", "L0.1 H0.2 L0.7", "M3 L2 H1"])
def test_prints_what_it_parsed(text: str) -> None:
    assert str(ModelSchedule.parse(text)) == text


def test_neighbours_of_one_model_are_one_segment() -> None:
    assert str(ModelSchedule.parse("L100 L25 H750 L125")) == "L125 H750 L125"


def test_one_letter_is_the_whole_run() -> None:
    assert str(ModelSchedule.parse("H")) == "H1.0"
    assert ModelSchedule.parse("L").each(7) == ["L"] * 7


@given(st.lists(st.sampled_from("HML"), min_size=1, max_size=60))
def test_one_key_a_step_comes_back(keys: list[str]) -> None:
    assert ModelSchedule.of(keys).each(len(keys)) == keys
    assert ModelSchedule.of(keys, shares=True).each(len(keys)) == keys
    assert ModelSchedule.parse(str(ModelSchedule.of(keys))).each(len(keys)) == keys


@given(st.floats(0.01, 0.99), st.sampled_from([*SHAPES]), st.sampled_from([100, 200, 1000]))
def test_a_shape_has_its_light_share(share: float, name: str, steps: int) -> None:
    schedule = ModelSchedule.parse(f"{name}:{share}")
    assert abs(schedule.each(steps).count("L") / steps - share) <= 0.5 / 100 + 2 / steps
    assert abs(schedule.share("L") - share) <= 0.5 / 100 + 1e-9


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("sandwich:0.5", "LLHHHHLL"),
        ("prefix:0.25", "LLHHHHHH"),
        ("suffix:0.25", "HHHHHHLL"),
        ("middle:0.5", "HHLLLLHH"),
        ("alternate:0.5", "HLHLHLHL"),
    ],
)
def test_the_shapes(shape: str, expected: str) -> None:
    steps = 8 if shape != "alternate:0.5" else 100
    assert "".join(ModelSchedule.parse(shape).each(steps)[:8]) == expected


def test_random_is_the_same_for_one_seed() -> None:
    one, again, other = (str(ModelSchedule.parse(f"random:0.3{seed}")) for seed in ("", ",0", ",1"))
    assert one == again != other


def test_whose_turn_it_is_between_steps() -> None:
    schedule = ModelSchedule.parse("L0.125 H0.75 L0.125")
    assert schedule.keys(torch.tensor([0.0, 0.1249, 0.125, 0.8749, 0.875, 1.0])) == ["L", "L", "H", "H", "L", "L"]
    assert schedule.each(1000) == ModelSchedule.parse("L125 H750 L125").each(1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no schedule"),
        ("L", None),
        ("l0.5 h0.5", "no schedule"),
        ("L125 H0.5", "all lengths in steps"),
        ("L0.5 H0.6", r"sum to 1\.1"),
        ("L0 H5", "above 0"),
        ("sandwich:2", "takes the share"),
        ("sandwich", "takes the share"),
        ("prefix:0.5,3", "takes the share"),
        ("random:0.5,x", "takes the share"),
    ],
)
def test_what_is_no_schedule(text: str, message: str | None) -> None:
    if message is None:
        ModelSchedule.parse(text)
        return
    with pytest.raises(InputError, match=message):
        ModelSchedule.parse(text)


def test_steps_and_models_have_to_be_those_of_the_run() -> None:
    schedule = ModelSchedule.parse("L125 H750 L125")
    schedule.check(1000, ["H", "L"])
    with pytest.raises(InputError, match="1000 steps and the run 256"):
        schedule.each(256)
    with pytest.raises(InputError, match="names L; the models are H, M"):
        schedule.check(1000, ["H", "M"])
