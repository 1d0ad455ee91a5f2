"""The benchmark of classes trains each kind, measures both stages, keeps its rows and ends in one JSON object."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "classes.py"


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not part of an installed package")
def test_quick(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("classes_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = ["classes.py", "--quick", "--kinds", "masks", "learned classes", "--rows", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", [*words, "--set", "width=16", "--set", "layers=1"])
    script.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    for one in rows.values():
        assert [point["step"] for point in one["checkpoints"]] == [1, 2, 3]
        assert all(2 < point["bits"]["value"] < 12 for point in one["checkpoints"])
        assert list(one["calls"]) == ["4", "8", "16", "32", "64"]
    point, calls = rows["learned classes"]["checkpoints"][-1], rows["learned classes"]["calls"]["8"]
    assert sum(part["value"] for part in point["parts"].values()) == pytest.approx(point["bits"]["value"])
    assert calls["class"]["value"] + calls["word"]["value"] == pytest.approx(calls["lost"]["value"])
    assert rows["masks"]["calls"]["64"]["lost"]["value"] == pytest.approx(0, abs=1e-9)
    kept = (tmp_path / "quick-classes.jsonl").read_text().splitlines()
    assert len(kept) == 2
    script.main()  # every row is there already
    assert (tmp_path / "quick-classes.jsonl").read_text().splitlines() == kept
