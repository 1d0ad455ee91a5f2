"""The benchmark of chorales: its counts are those of a slow count, and it measures models of a small collection."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import scores
from conftest import Dlm

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chorales.py"
TOY = ["--set", "steps=1", "--set", "layers=1", "--set", "width=16", "--set", "heads=2", "--set", "batch=2", "--set", "eval_windows=2"]

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not part of an installed package")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chorales_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def slow(train: list[list[int]], val: list[list[int]], order: int, pull: float, script: ModuleType) -> list[float]:
    """p of every validation token, by the definition."""

    def context(piece: list[int], at: int, k: int) -> tuple[int, ...]:
        return (at % 4, *([script.START] * k + piece)[at : at + k])

    found = []
    for piece in val:
        for at, token in enumerate(piece):
            p = 1 / script.SIZE
            for k in [k for k in script.ORDERS if k <= order]:
                seen = Counter(x for other in train for i, x in enumerate(other) if context(other, i, k) == context(piece, at, k))
                p = (seen[token] + pull * p) / (seen.total() + pull)
            found.append(p)
    return found


def test_counts_are_those_of_the_definition(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    train, val = ([rng.integers(0, 3, 4 * n) for n in sizes] for sizes in ((9, 5), (4, 3)))
    found = script.counted(train, val)
    for order, pull in ((0, 1.0), (2, 4.0), (6, 1.0)):
        wanted = slow([piece.tolist() for piece in train], [piece.tolist() for piece in val], order, pull, script)
        assert np.exp(-found[order, pull]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.slow
def test_it_measures_both_models(
    dlm: Dlm, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = scores.collection(tmp_path / "scores")
    for recipe in ("chorales", "chorales-ar"):
        assert dlm("train", recipe, "--data", f"chorales:{folder}", "--out", f"runs/{recipe}", *TOY)[0] == 0
    monkeypatch.setattr(sys, "argv", ["chorales.py", "--scores", str(folder), "--passes", "2", "--history", "history.jsonl"])
    capsys.readouterr()
    script.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["model"].split()[0] for row in line["rows"]] == ["counts", "autoregressive", "masked", "masked,"]
    assert all(3 < row["bits"] < 2 * math.log2(48) for row in line["rows"][1:])
    assert json.loads(Path("history.jsonl").read_text()) == line
