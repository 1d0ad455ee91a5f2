"""The benchmark of the training step runs and ends in one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not part of an installed package")
def test_quick() -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), "--quick"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert {row["step"] for row in result["results"]} == {"dlm masked", "dlm block", "plain causal"}
    assert all(row["tokens_per_second"] > 0 and 0 < row["share_of_peak"] < 1 for row in result["results"])
