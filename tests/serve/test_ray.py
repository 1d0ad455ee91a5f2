"""Two replicas on one machine: whichever answers, it is the answer of one server alone, whole or streamed."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import dlm
from serve.serving import Served, events, serving, wait

LACKING = [name for name in ("ray", "fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(LACKING), reason=f"{', '.join(LACKING)} missing: pip install 'dlm[ray]'")]
SOURCE = Path(__file__).parents[2] / "src"
ASKED: list[dict[str, Any]] = [
    {"model": "tiny-masked", "prompt": "ROMEO", "max_tokens": 40, "steps": 8, "seed": 3},
    {"model": "tiny-masked", "prompt": "a", "suffix": "b", "max_tokens": 9, "seed": 4, "n": 2},
    {"model": "tiny-ar", "prompt": "ROMEO", "max_tokens": 40, "seed": 5, "sampler": "lookup:4", "logprobs": 1},
]


@pytest.fixture(scope="module")
def alone(masked_dir: Path, autoregressive_dir: Path) -> Iterator[Served]:
    with serving([dlm.load(str(masked_dir)), dlm.load(str(autoregressive_dir))]) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(masked_dir: Path, autoregressive_dir: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """Its address as a client, and its process, which a line ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {"models": f"{masked_dir},{autoregressive_dir}", "replicas": "2", "cpus": "0.5"}  # texts, as a command line gives them
    command = [sys.executable, str(Path(__file__).with_name("cluster.py")), str(port), json.dumps(arguments)]
    env = os.environ | {"PYTHONPATH": str(SOURCE), "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert any(line == "ready\n" for line in process.stdout)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                yield client, process
            assert process.wait(60) == 0
        finally:
            process.terminate()


def counted(client: httpx.Client, name: str) -> dict[str, float]:
    """A number of /metrics by the replica that told it, of both."""
    found: dict[str, float] = {}
    while len(found) < 2:
        answer = client.get("/metrics")
        found[answer.headers["X-Replica"]] = next(float(line.split()[1]) for line in answer.text.splitlines() if line.startswith(name))
    return found


def test_two_replicas_answer_as_one_server(alone: Served, cluster: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    client, process = cluster
    for asked in ASKED:
        expected, answered = alone.post("/v1/completions", asked).json(), set[str]()
        for _ in range(200):
            answer = client.post("/v1/completions", json=asked)
            assert answer.status_code == 200, answer.text
            assert [answer.json()[part] for part in ("choices", "usage")] == [expected[part] for part in ("choices", "usage")]
            answered.add(answer.headers["X-Replica"])
            if len(answered) == 2:
                break
        assert len(answered) == 2
        told = events(client.post("/v1/completions", json=asked | {"stream": True}).text, parse=False)
        texts = [""] * len(expected["choices"])
        for _, data in told[:-1]:
            for choice in json.loads(data)["choices"]:
                texts[choice["index"]] += choice["text"]
        assert told[-1][1] == "[DONE]"
        assert texts == [choice["text"] for choice in expected["choices"]]
    native = {"model": "tiny-masked", "prompt": "a", "max_tokens": 12, "steps": 6, "seed": 1}
    assert events(client.post("/v1/dlm/generate", json=native).text)[1:-1] != []
    assert events(client.post("/v1/dlm/generate", json=native).text)[-1][1]["text"] == alone.native(native)[-1][1]["text"]

    refused = client.post("/v1/completions", json={"model": "nobody"})
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models", headers={"Host": "elsewhere"}).status_code == 400
    assert "<title>" in client.get("/").text

    long = {"model": "tiny-ar", "prompt": "a", "max_tokens": 4000, "seed": 1, "stream": True}
    with client.stream("POST", "/v1/completions", json=long) as answer:
        next(answer.iter_lines())
    wait(lambda: sum(counted(client, "dlm_engine_cancelled_total").values()) == 1)  # who leaves frees the row

    finishing, answers = {"model": "tiny-ar", "prompt": "a", "max_tokens": 600, "seed": 2}, list[httpx.Response]()
    last = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=finishing)))
    last.start()
    wait(lambda: sum(counted(client, "dlm_engine_running").values()) == 1)
    assert process.stdin is not None
    print(file=process.stdin, flush=True)  # the deployment is deleted, which waits for what runs
    last.join(60)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 600
