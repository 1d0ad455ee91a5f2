"""`--sampler auto`: which row of a measured table is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dlm.calibration.table import FILE, Calibration, Row
from dlm.errors import InputError


def row(name: str, calls: float, seconds: float, bits: float, entropy: float = 4.5, distinct_4: float = 0.8, exact: bool = False) -> Row:
    return Row({"sampler": name}, calls, seconds, bits, 0.05, entropy, distinct_4, exact)


TABLE = Calibration(
    [
        row("first-hitting", 256, 8.0, 4.0, exact=True),
        row("ancestral", 64, 2.0, 4.3),
        row("speculative:8", 40, 9.0, 4.02, exact=True),
        row("cached", 128, 3.0, 4.05),
        row("dull", 16, 0.5, 3.0, entropy=4.0),
        row("repeating", 16, 0.5, 3.1, distinct_4=0.5),
        row("hasty", 16, 0.5, 5.0),
    ],
    {"judge": "twin"},
)


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        ("calls:16", "hasty"),
        ("calls:40", "speculative:8"),
        ("calls:1000", "first-hitting"),
        ("seconds:2", "ancestral"),
        ("seconds:3", "cached"),
        ("bits:0", "first-hitting"),
        ("bits:0.1", "cached"),
        ("bits:0.5", "ancestral"),
        ("bits:5", "hasty"),
    ],
)
def test_the_best_row_within_the_budget(budget: str, chosen: str) -> None:
    assert TABLE.choose(budget).options["sampler"] == chosen


def test_dull_text_is_never_chosen() -> None:
    assert not {row.options["sampler"] for row in TABLE.fair()} & {"dull", "repeating"}


def test_the_front() -> None:
    assert [row.options["sampler"] for row in TABLE.front("calls")] == ["hasty", "speculative:8", "first-hitting"]
    assert [row.options["sampler"] for row in TABLE.front("seconds")] == ["hasty", "ancestral", "cached", "first-hitting"]


@pytest.mark.parametrize("budget", ["", "calls", "calls:", "calls:x", "tokens:3", "bits:-1", "seconds:inf", "calls:nan"])
def test_no_budget(budget: str) -> None:
    with pytest.raises(InputError, match="a budget is"):
        TABLE.choose(budget)


def test_a_budget_that_nothing_keeps() -> None:
    with pytest.raises(InputError, match="calls:16"):
        TABLE.choose("calls:3")


def test_on_disk(tmp_path: Path) -> None:
    assert TABLE.save(tmp_path) == tmp_path / FILE
    assert Calibration.load(tmp_path) == TABLE
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_none_on_disk(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dlm calibrate"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [], "made": {}}', '{"rows": [{"calls": 3}], "made": {}}', "{"])
def test_a_damaged_table(tmp_path: Path, text: Any) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match="damaged"):
        Calibration.load(tmp_path)
