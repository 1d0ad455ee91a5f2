"""The benchmark of recipes runs its ladder and ends in one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recipes.py"


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not part of an installed package")
def test_quick() -> None:
    run = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout.splitlines()[-1])["rows"]
    assert len(rows) == 5
    assert all(len(row["runs"]) == 2 and 0 < row["nats_per_character"] < 6 for row in rows)
