"""The benchmark of learned orders trains each kind of noise, keeps its rows and ends in one JSON object."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "orders.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not part of an installed package")


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("orders", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_slope_is_the_length_of_the_gradient_and_0_for_noise() -> None:
    script, rng = loaded(), torch.Generator().manual_seed(0)
    noise_MN = torch.randn(400, 50, generator=rng, dtype=torch.float64)
    true_N = torch.randn(50, generator=rng, dtype=torch.float64)
    signal, nothing = script.slope(true_N + noise_MN), script.slope(noise_MN)
    assert signal["slope"] == pytest.approx(float(true_N.norm()) * 50**0.5, abs=4 * signal["slope_stderr"])
    assert signal["signal_to_noise"] == pytest.approx(float(true_N.norm()) / 50**0.5, rel=0.1)
    assert abs(nothing["slope"]) < 4 * nothing["slope_stderr"] < 4
    assert nothing["signal_to_noise"] < 0.03


@pytest.mark.slow
def test_quick(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = loaded()
    words = ["orders.py", "--quick", "--rows", str(tmp_path / "rows.jsonl"), "--set", "width=16", "--set", "layers=1"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["noise"] for row in rows] == ["masked", "ordered, held", "ordered", "genmd4, held", "genmd4"]
    assert all(len(row["runs"]) == 1 and 3 < row["bits"] < 12 for row in rows)
    assert rows[0]["difference"] == 0
    kept = (tmp_path / "quick-orders.jsonl").read_text().splitlines()
    assert len(kept) == 5
    assert ["slope" in row["runs"][0] for row in rows] == [False, True, True, True, True]
    script.main()  # every row is there already
    assert (tmp_path / "quick-orders.jsonl").read_text().splitlines() == kept
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*words, "--kinds", *script.CONTROLS])
    script.main()
    bits = {row["noise"]: row["bits"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert len(bits) == len(script.CONTROLS) == len(set(bits.values()))  # each control differs from every other
