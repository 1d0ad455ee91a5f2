"""The README's commands and Python run as they stand, in order, in one directory.

A block may say otherwise in an HTML comment on the line before it: `<!-- make -->` (run by continuous integration itself),
`<!-- network -->`, `<!-- gpu -->` (not run), `<!-- long -->` (run with a few steps only).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dlm.models import checkpoint

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
BLOCK = re.compile(r"(?:<!-- (?P<mark>\w+) -->\n)?```(?P<language>bash|python)\n(?P<body>.*?)```", re.S)
SHORT = "--set steps=2 --set batch=2 --set eval_windows=2 --set layers=1 --set width=24 --set heads=2"


def blocks() -> list[tuple[str, str, str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [(m["language"], m["body"], m["mark"] or "") for m in BLOCK.finditer(text)]


def run(words: list[str], cwd: Path) -> str:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_block_is_marked_with_a_known_word() -> None:
    assert blocks(), "the README has no commands"
    assert {mark for _, _, mark in blocks()} <= {"", "make", "network", "gpu", "long"}


@pytest.mark.skipif("shakespeare-mask" not in checkpoint.bundled(), reason="the bundled checkpoints are not here")
@pytest.mark.timeout(1800)
def test_readme_commands_run(tmp_path: Path) -> None:
    cwd = tmp_path / "work"
    cwd.mkdir()
    (tmp_path / "shared").symlink_to(ROOT.parent / "shared")
    (cwd / "benchmarks").symlink_to(ROOT / "benchmarks")
    (cwd / "my.txt").write_text("All the world's a stage, and all the men and women merely players.\n" * 300)
    ran = 0
    for language, body, mark in blocks():
        if mark in ("make", "network", "gpu"):
            continue
        if language == "python":
            run([sys.executable, "-c", body], cwd)
            ran += 1
            continue
        for line in body.replace("\\\n", " ").splitlines():
            command = line.split(" #")[0].strip()
            if not command or command.startswith("#") or ("../shared" in command and not DATA.is_file()):
                continue
            words = shlex.split(command)
            if mark == "long":
                words += shlex.split(SHORT) if words[:2] == ["dlm", "train"] else ["--quick"] if "benchmarks" in command else []
            run(words if words[0] == "dlm" else [sys.executable, *words[1:]], cwd)
            ran += 1
    assert ran >= 5
