"""Every script of examples/ runs in a process of its own with small settings, and the notebook from its first cell to its last."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

import programs
import scores

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src")}
MAX_SCRIPT_LINES = 60

pytestmark = pytest.mark.slow


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


SETTINGS: dict[str, Callable[[], list[str]]] = {
    "generate_and_watch": lambda: ["ROMEO:", "4"],
    "train_on_your_text": lambda: ["text.txt", "4"],
    "own_rule": lambda: ["6"],
    "own_noise": lambda: ["200"],
    "own_denoiser": lambda: ["4"],
    "evaluate_bound": lambda: ["1"],
    "schedule_search": lambda: ["2", "4"],
    "lossless_draft": lambda: ["24"],
    "serve_openai": lambda: [free_port()],
    "digits": lambda: ["2", "1"],
    "harmonise": lambda: ["scores", "made.mid", "2"],
}
PRINTED = {
    "generate_and_watch": "tokens per forward pass",
    "train_on_your_text": "nats per token after 4 steps",
    "own_rule": "ROMEO:",
    "own_noise": "nats per character, entropy",
    "own_denoiser": "ROMEO:",
    "evaluate_bound": "blocks of 256",
    "schedule_search": "best: ",
    "lossless_draft": "The same text from all of them",
    "serve_openai": "ROMEO:",
    "digits": "are recognised as their class",
    "harmonise": "64 sixteenths in ",
}
NEEDS = {"digits": "sklearn"}
"""A package beside those of dlm."""


def test_every_script_is_run() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(SETTINGS)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_a_script_is_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_SCRIPT_LINES


@pytest.mark.parametrize("name", SETTINGS)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    (tmp_path / "text.txt").write_text("All the world's a stage, and all the men and women merely players.\n" * 300)
    scores.collection(tmp_path / "scores")
    done = programs.run([str(EXAMPLES / f"{name}.py"), *SETTINGS[name]()], tmp_path)
    assert done.returncode == 0, done.stderr
    assert PRINTED[name] in done.stdout


RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
for cell in notebook.cells:
    cell.source = cell.source.replace("STEPS = 500", "STEPS = 20").replace("count=24", "count=1")
NotebookClient(notebook, timeout=400).execute()
nbformat.write(notebook, sys.argv[2])
"""


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_runs(tmp_path: Path) -> None:
    before = nbformat.read(EXAMPLES / "masked_diffusion.ipynb", 4)
    words = [sys.executable, "-c", RUN, str(EXAMPLES / "masked_diffusion.ipynb"), str(tmp_path / "run.ipynb")]
    done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert pictures(nbformat.read(tmp_path / "run.ipynb", 4)) == pictures(before) == 4
