"""What the bundled models write and are worth is what was recorded when they were trained (`tests/recorded.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import recorded

pytestmark = pytest.mark.slow

KNOWN = json.loads(recorded.FILE.read_text(encoding="utf-8"))


def label(case: dict[str, Any]) -> str:
    return f"{case['model']}-{'-'.join(str(value) for value in case['options'].values())}".replace("\n", " ")


def test_every_case_was_recorded() -> None:
    assert [(one["model"], one["options"]) for one in KNOWN["texts"]] == list(recorded.cases())
    assert [one["arguments"] for one in KNOWN["bounds"]] == list(recorded.bounds())


@pytest.mark.parametrize("case", KNOWN["texts"], ids=label)
def test_texts_are_those_that_were_recorded(case: dict[str, Any]) -> None:
    found = recorded.write((case["model"], case["options"]))
    assert found == {"text": case["text"], "forwards": case["forwards"]}


@pytest.mark.parametrize("case", KNOWN["bounds"], ids=lambda case: case["arguments"][0])
def test_bounds_are_those_that_were_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    found = recorded.measure(case["arguments"], tmp_path)
    for name in ("nats_per_token", "bits_per_char", "stderr"):
        assert found[name] == pytest.approx(case["figures"][name], rel=1e-4)
    for name in ("estimator", "is_bound", "tokens", "characters"):
        assert found[name] == case["figures"][name]
