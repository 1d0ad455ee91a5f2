"""The README's commands and Python run as they stand, in order, in one directory.

A block may say otherwise in an HTML comment on the line before it: `<!-- make -->` (run by continuous integration itself),
`<!-- network -->`, `<!-- gpu -->` (not run), `<!-- long -->` (run with a few steps only), `<!-- serve -->` (the first command
serves the others).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlm import bundled

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
BLOCK = re.compile(r"(?:<!-- (?P<mark>\w+) -->\n)?```(?P<language>bash|python)\n(?P<body>.*?)```", re.S)
SHORT = "--set steps=2 --set batch=2 --set eval_windows=2 --set layers=1 --set width=24 --set heads=2"


def blocks() -> list[tuple[str, str, str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [(m["language"], m["body"], m["mark"] or "") for m in BLOCK.finditer(text)]


ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT / "src"),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "2",
}


def run(words: list[str], cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, timeout=500)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def served(commands: list[list[str]], cwd: Path) -> None:
    """The first command is a server; once it answers, the others run, and Ctrl-C ends it."""
    server, *others = commands
    port = server[server.index("--port") + 1]
    with subprocess.Popen(server, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            until = time.monotonic() + 120
            while subprocess.run(["curl", "-sf", f"http://127.0.0.1:{port}/healthz"], capture_output=True).returncode:
                assert process.poll() is None, "the server of the README ended"
                assert time.monotonic() < until, "the server of the README does not answer"
                time.sleep(0.5)
            for words in others:
                assert json.loads(run([*words, "-sf"], cwd))["choices"][0]["text"], words
        finally:
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output


def test_every_block_is_marked_with_a_known_word() -> None:
    assert blocks(), "the README has no commands"
    assert {mark for _, _, mark in blocks()} <= {"", "make", "network", "gpu", "long", "serve"}


@pytest.mark.slow
@pytest.mark.skipif("shakespeare-mask" not in bundled.models(), reason="the bundled checkpoints are not here")
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
        if mark == "serve":
            served([shlex.split(line.split(" #")[0]) for line in body.splitlines()], cwd)
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
