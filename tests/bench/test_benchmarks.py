"""Every benchmark runs with --quick and ends with one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = {
    "bundled": ["--quick"],
    "caches": ["--quick"],
    "decoding_call": ["--quick"],
    "dna": ["--quick"],
    "frontier": [],
    "granularity": ["--quick"],
    "grids": ["--quick"],
    "loading": ["--gigabytes", "0.02"],
    "long": ["--quick"],
    "lossless": ["--quick"],
    "markov": ["--quick"],
    "model_schedules": ["--quick"],
    "noise": ["steps", "--quick"],
    "open_models": ["--small", "--methods", "transformers,dlm,early-end,int4 dual"],
    "orders": ["--quick"],
    "samplers": ["--quick"],
    "sampling": ["--quick"],
    "scaling": ["--quick"],
    "seams": ["--quick"],
    "threads": ["--quick"],
}
ELSEWHERE = {"training", "recipes", "chorales", "classes", "vectors", "serving"}  # tests/train; servers of its own and minutes


def test_every_benchmark_is_listed() -> None:
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == QUICK.keys() | ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_ends_with_json(name: str, tmp_path: Path) -> None:
    """In an empty directory, with the bundled data set and models alone."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *QUICK[name]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)
