"""Forked programs see what programs of their own would: arguments, a directory, an environment, streams, and no tests."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

import programs

SCRIPT = """
import atexit, os, sys
import beside
atexit.register(lambda: print("left"))
print(__name__, sys.argv[1:], os.getcwd(), os.environ["TOLD"], beside.here)
print("to the error stream", file=sys.stderr)
try:
    import conftest
except ImportError:
    print("no tests")
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_script(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD", "told")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside.py").write_text("here = True")
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    done = programs.run([str(tmp_path / "scripts" / "script.py"), str(code), "b"], tmp_path)
    assert done.returncode == code
    assert done.stdout == f"__main__ ['{code}', 'b'] {tmp_path} told True\nno tests\nleft\n"
    assert done.stderr == "to the error stream\n"


def test_an_error_and_the_command(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\nprint('before')\n1 / 0")
    done = programs.run([str(tmp_path / "script.py")], tmp_path)
    assert (done.returncode, done.stdout) == (1, "before\n")
    assert "ZeroDivisionError" in done.stderr
    done = programs.run(["dlm", "generate", "--no"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dlm: no such option: --no")


def test_one_that_does_not_end_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '300']).pid, file=open('pid', 'w'), flush=True); time.sleep(300)"
    (tmp_path / "script.py").write_text(code)
    with pytest.raises(subprocess.TimeoutExpired):
        programs.run([str(tmp_path / "script.py")], tmp_path, timeout=5)
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.1)
