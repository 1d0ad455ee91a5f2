"""The script of the bundled models at toy length: several processes, a light model after its teacher, a finished run left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "dev" / "train_bundled.py"
TOY = ["steps=2", "batch=2", "layers=2", "width=12", "heads=2", "eval_windows=2", "eval_passes=1"]


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="scripts of developers are not part of an installed package")
def test_toy(tmp_path: Path) -> None:
    names = "shakespeare-mask,shakespeare-words-ar,shakespeare-mask-2"
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--models", names, "--together", "2"]
    command += [word for setting in TOY for word in ("--set", setting)]
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr + "".join(file.read_text() for file in tmp_path.glob("*.out"))
        result = json.loads(run.stdout.splitlines()[-1])
        assert {name: row["step"] for name, row in result["models"].items()} == dict.fromkeys(names.split(","), 2)
    trained = json.loads((tmp_path / "shakespeare-mask-2" / "config.json").read_text())["training"]
    assert trained["teacher"] == trained["init"] == str(tmp_path / "shakespeare-mask")
