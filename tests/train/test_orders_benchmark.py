"""The benchmark of learned orders trains each kind of noise, keeps its rows and ends in one JSON object."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "orders.py"


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not part of an installed package")
def test_quick(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("orders", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = ["orders.py", "--quick", "--rows", str(tmp_path / "rows.jsonl"), "--set", "width=16", "--set", "layers=1"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["noise"] for row in rows] == ["masked", "ordered, held", "ordered", "genmd4, held", "genmd4"]
    assert all(len(row["runs"]) == 1 and 3 < row["bits"] < 12 for row in rows)
    assert rows[0]["difference"] == 0
    kept = (tmp_path / "quick-orders.jsonl").read_text().splitlines()
    assert len(kept) == 5
    script.main()  # every row is there already
    assert (tmp_path / "quick-orders.jsonl").read_text().splitlines() == kept
