"""Every benchmark runs with --quick and ends with one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import programs

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
    done = programs.run([str(ROOT / "benchmarks" / f"{name}.py"), *QUICK[name]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)
