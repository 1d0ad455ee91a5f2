"""Programs that tests run: processes of their own, forked from one that has torch loaded, so that each starts in a moment.

A test of what a process is when it starts (its imports, its signals, its terminal) takes `subprocess` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["dlm.workflows.fit", "torch._dynamo", "rich.live", "scipy.stats"])


def process(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Not started yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "src"))  # of the process that all are forked from
        forkserver.ensure_running()
    return FORK.Process(target=target, args=args)


def run(words: Sequence[str], cwd: Path, timeout: float = 550) -> subprocess.CompletedProcess[str]:
    """words: `dlm` or the path of a script, and its arguments. As `subprocess.run` with `capture_output`.

    TimeoutExpired: it was ended after so many seconds."""
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / name for name in ("out", "err")]
        child = process(main, list(words), cwd, dict(os.environ), files)
        child.start()
        assert child.pid is not None
        try:
            child.join(timeout)
            if child.exitcode is None:
                raise subprocess.TimeoutExpired(list(words), timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it has started, too
                os.killpg(child.pid, signal.SIGKILL)
            child.join()
        out, err = (file.read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess(list(words), child.exitcode, out, err)


def main(words: list[str], cwd: Path, environment: dict[str, str], files: list[Path]) -> None:
    """What a forked process does, in a group of its own."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = words
    sys.path = [path for path in sys.path if Path(path) != Path(__file__).parent]  # a program knows nothing of the tests
    try:
        if words[0] == "dlm":
            from dlm import cli

            cli.main()
        else:
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
