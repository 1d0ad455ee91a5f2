"""The commands and the Python of README.md and docs/tour.md run as they stand, in order, each section in a directory of its own.

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

import programs

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/tour.md")
NOT_RUN = {"make", "network", "gpu"}
MARKS = NOT_RUN | {"", "long", "serve"}
BLOCK = re.compile(r"(?:<!-- (?P<mark>\w+) -->\n)?```(?P<language>bash|python)\n(?P<body>.*?)```", re.S)
SHORT = "--set steps=2 --set batch=2 --set eval_windows=2 --set layers=1 --set width=24 --set heads=2"


def sections(page: str) -> dict[str, list[tuple[str, str, str]]]:
    """(language, body, mark) of every block, by the heading that it stands under."""
    parts = (ROOT / page).read_text(encoding="utf-8").split("\n## ")
    found = {part.partition("\n")[0]: [(m["language"], m["body"], m["mark"] or "") for m in BLOCK.finditer(part)] for part in parts}
    return {heading: blocks for heading, blocks in found.items() if blocks}


def runs(blocks: list[tuple[str, str, str]]) -> bool:
    return any(mark not in NOT_RUN for _, _, mark in blocks)


SECTIONS = [(page, heading) for page in PAGES for heading, blocks in sections(page).items() if runs(blocks)]

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT / "src"),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def run(words: list[str], cwd: Path, *, forked: bool = False) -> str:
    if forked:
        done = programs.run(words, cwd)
    else:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, timeout=500)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    assert "old spelling" not in done.stderr, f"{shlex.join(words)}\n{done.stderr}"
    return done.stdout


def served(commands: list[list[str]], cwd: Path) -> None:
    """The first command is a server; once it answers, the others run, and Ctrl-C ends it."""
    server, *others = commands
    port = server[server.index("--port") + 1]
    with subprocess.Popen(server, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            until = time.monotonic() + 120
            while subprocess.run(["curl", "-sf", f"http://127.0.0.1:{port}/healthz"], capture_output=True).returncode:
                assert process.poll() is None, "the server of the page ended"
                assert time.monotonic() < until, "the server of the page does not answer"
                time.sleep(0.5)
            for words in others:
                assert json.loads(run([*words, "-sf"], cwd))["choices"][0]["text"], words
        finally:
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_marked_with_a_known_word(page: str) -> None:
    marks = {mark for blocks in sections(page).values() for _, _, mark in blocks}
    assert marks, f"{page} has no commands"
    assert marks <= MARKS


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_commands_that_run(page: str) -> None:
    blocks = [(body, mark) for found in sections(page).values() for language, body, mark in found if language == "bash"]
    assert sum(len(commands(body, mark)) for body, mark in blocks if mark not in NOT_RUN) >= 3


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 115


def commands(body: str, mark: str) -> list[list[str]]:
    """The command lines of a block, in words, with few steps where the block is long."""
    found = []
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.split(line.split(" #")[0])
        if words and not line.startswith("#"):
            found.append(words + (shlex.split(SHORT) if mark == "long" and words[:2] == ["dlm", "train"] else []))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("page", "heading"), SECTIONS)
def test_readme_commands_run(page: str, heading: str, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("All the world's a stage, and all the men and women merely players.\n" * 300)
    for language, body, mark in sections(page)[heading]:
        if mark in NOT_RUN:
            continue
        if language == "python":
            run([sys.executable, "-c", body], tmp_path)
        elif mark == "serve":
            served(commands(body, mark), tmp_path)
        else:
            for words in commands(body, mark):
                # README.md alone takes the installed command, which loads torch anew each time.
                run(words if words[0] == "dlm" else words[1:], tmp_path, forked=page != "README.md" or words[0] != "dlm")
