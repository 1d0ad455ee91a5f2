"""`dlm serve` as a process: says where it is, answers, ends at Ctrl-C; and what it does not begin with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Dlm
from serve.serving import curl

SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.slow
def test_it_serves_until_ctrl_c(masked_dir: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(SOURCE), "DLM_API_KEYS": "one, two"}
    command = [sys.executable, "-m", "dlm", "serve", str(masked_dir), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(3)]
        url = lines[0].split()[0]
        assert masked_dir.name in lines[1]
        assert lines[2].startswith(f"curl {url}/v1/completions")
        body = json.dumps({"prompt": "a", "max_tokens": 5}).encode()
        retry = "--retry-connrefused", "--retry", "20", "--retry-delay", "1"
        status, text = curl(f"{url}/v1/completions", *retry, "-H", "Authorization: Bearer two", body=body)
        assert status == 200
        assert len(json.loads(text)["choices"][0]["text"]) == 5
        assert curl(f"{url}/v1/completions", body=body)[0] == 401
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, process.stderr.read()
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nobody"], "no checkpoint"),
        (["--port", "99999"], "--port"),
        (["--deadline", "0"], "--deadline"),
        (["--max-batch", "0"], "--max-batch"),
        (["--adapter", "auto"], "name that model alone"),
    ],
    ids=str,
)
def test_it_does_not_begin(dlm: Dlm, words: list[str], why: str) -> None:
    code, _, err = dlm("serve", *words)
    assert code == 2
    assert why in err


def test_the_extra_that_it_needs_is_named(dlm: Dlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'dlm[serve]'" in dlm.told("serve", "sudoku-4")


def test_a_port_that_is_taken(dlm: Dlm, masked_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = dlm("serve", str(masked_dir), "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "use another --port" in err
