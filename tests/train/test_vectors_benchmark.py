"""The benchmark of noise on vectors trains each kind, keeps its rows and ends in one JSON object."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vectors.py"


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not part of an installed package")
def test_quick(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("vectors", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = ["vectors.py", "--quick", "--rows", str(tmp_path / "rows.jsonl"), "--set", "width=16", "--set", "layers=1"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["noise"] for row in rows] == list(script.KINDS)
    assert all(len(row["runs"]) == 1 and 2 < row["nats"] < 9 for row in rows)
    parts = rows[-1]["runs"][0]["parts"]
    assert sum(parts.values()) == pytest.approx(rows[-1]["nats"])
    kept = (tmp_path / "quick-vectors.jsonl").read_text().splitlines()
    script.main()  # every row is there already
    assert (tmp_path / "quick-vectors.jsonl").read_text().splitlines() == kept
