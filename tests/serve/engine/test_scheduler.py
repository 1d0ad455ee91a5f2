"""A busy server: rows share forward passes, and a request that is late, left, slow or broken harms no other."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest
import torch

from conftest import make_model
from dlm.language_model import LanguageModel
from dlm.serve.guard import Limits
from serve.serving import Served, Watch, events, serving, shape, wait

pytest.importorskip("fastapi")


def test_a_full_queue_says_when_to_come_again(served: Served, watch: Watch) -> None:
    watch.gate.clear()
    asked = {"model": "tiny", "max_tokens": 4, "steps": 2, "n": 12}
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(served.post("/v1/completions", asked)))
    try:
        waiting.start()
        wait(lambda: served.engine.running + served.engine.waiting == 12)
        refused = served.post("/v1/completions", asked | {"n": 1})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert shape(refused.text)["code"] == "queue_full"
    finally:
        watch.gate.set()
        waiting.join(30)
    assert answers[0].status_code == 200
    assert len(answers[0].json()["choices"]) == 12


def test_a_deadline_ends_a_request() -> None:
    slow = make_model(window=32)
    Watch(slow).seconds = 0.05
    with serving([slow], Limits(deadline=0.3)) as made:
        asked = {"max_tokens": 30, "steps": 30, "sampler": "first-hitting"}
        answer = made.post("/v1/completions", asked)
        assert answer.status_code == 504
        assert shape(answer.text)["code"] == "deadline_exceeded"
        told = made.native(asked)
        assert told[0][0] == "begin"
        assert told[-1][0] == "error"
        assert told[-1][1]["error"]["code"] == "deadline_exceeded"
        wait(lambda: not made.engine.running)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(served: Served, watch: Watch, stream: bool) -> None:
    """Within one forward pass."""
    asked = {"model": "tiny", "max_tokens": 300, "steps": 256, "sampler": "first-hitting", "stream": stream}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = served.url.removeprefix("http://").split(":")
    begun, cancelled = watch.calls, served.engine.counts.cancelled
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait(lambda: watch.calls > begun + 2)
        watch.gate.clear()
        calls = watch.calls
        connection.shutdown(socket.SHUT_RDWR)

    def heard() -> bool:
        """Whether the server has noticed: the row is marked while the closed gate holds its pass, or has left between two passes."""
        rows = (job for lane in list(served.engine._lanes.values()) for group in lane.groups for job in group.jobs)
        return served.engine.counts.cancelled > cancelled or any(job.cancelled for job in rows)

    wait(heard)
    watch.gate.set()
    wait(lambda: served.engine.running == 0)
    assert watch.calls - calls <= 2
    assert served.engine.counts.cancelled == cancelled + 1


def test_a_request_that_cannot_begin_leaves_the_engine_as_it_is(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """The lane that was made for it goes without a forward pass."""
    assert served.post("/v1/completions", {"model": "tiny-ar", "prompt": "a", "suffix": "b"}).status_code == 400
    assert served.post("/v1/completions", {"model": "tiny-ar", "prompt": "a", "max_tokens": 1}).status_code == 200
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_one_broken_request_harms_no_other(served: Served, watch: Watch, models: list[LanguageModel]) -> None:
    """A forward pass that fails for all is repeated for each alone; the guilty one fails, the others get the text that they get alone."""
    tiny = models[1]
    asked = [
        {"model": "tiny", "prompt": prompt, "max_tokens": 25, "steps": 9, "seed": seed} for seed, prompt in enumerate(("a", "b", "Z!", "c"))
    ]
    alone = [served.post("/v1/completions", one).json()["choices"] for one in asked]
    watch.gate.clear()
    answers: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda k=k, one=one: answers.update({k: served.post("/v1/completions", one)}))
        for k, one in enumerate(asked)
    ]
    for thread in threads:
        thread.start()
    wait(lambda: served.engine.running + served.engine.waiting == 4)
    watch.poison = tiny.tokenizer.encode("!")[0]
    guilty = [2] + [k for k, choices in enumerate(alone) if k != 2 and "!" in choices[0]["text"][:-1]]
    watch.gate.set()
    for thread in threads:
        thread.join(30)
    watch.poison = None
    assert answers[2].status_code == 500
    assert shape(answers[2].text)["code"] == "internal_error"
    assert len(guilty) < 4
    for k in set(range(4)) - set(guilty):
        assert answers[k].json()["choices"] == alone[k]


def test_requests_that_arrive_together_share_calls_and_keep_their_texts(served: Served, watch: Watch, watch_ar: Watch) -> None:
    """Sixteen of all kinds at once: each is the answer that it is alone, in fewer calls of the networks."""
    asked = []
    for k in range(16):
        one: dict[str, Any] = {"seed": k, "prompt": "ab"[: k % 3] + "c", "max_tokens": 10 + 3 * (k % 5), "logprobs": 1}
        one |= {"model": "tiny", "steps": 8} if k % 2 else {"model": "tiny-ar"}
        asked.append(one | ({"sampler": "confidence:0.1"} if k % 4 == 3 else {"sampler": "strided:3"} if k % 4 == 2 else {}))
    networks = [watch, watch_ar]
    calls = sum(network.calls for network in networks)
    alone = [served.post("/v1/completions", one).json() for one in asked]
    by_one = sum(network.calls for network in networks) - calls
    answers: dict[int, Any] = {}

    def ask(k: int) -> None:
        while (answer := served.post("/v1/completions", asked[k])).status_code == 429:
            time.sleep(0.02)
        answers[k] = answer.json()

    calls = sum(network.calls for network in networks)
    threads = [threading.Thread(target=ask, args=(k,)) for k in range(16)]
    for network in networks:
        network.gate.clear()
    for thread in threads:
        thread.start()
    wait(lambda: served.engine.running + served.engine.waiting == 12)  # all that fit
    for network in networks:
        network.gate.set()
    for thread in threads:
        thread.join(60)
    together = sum(network.calls for network in networks) - calls
    for k in range(16):
        mine, other = answers[k]["choices"][0], alone[k]["choices"][0]
        assert mine["text"] == other["text"], k
        assert answers[k]["usage"] == alone[k]["usage"], k
        assert torch.allclose(
            torch.tensor(mine["logprobs"]["token_logprobs"]), torch.tensor(other["logprobs"]["token_logprobs"]), atol=1e-3
        )
    assert together < 0.6 * by_one, (together, by_one)


def test_a_shutdown_finishes_what_runs() -> None:
    tiny = make_model(window=32)
    watch = Watch(tiny)
    answers: list[Any] = []
    with serving([tiny]) as made:
        watch.gate.clear()
        asked = {"max_tokens": 20, "steps": 10, "seed": 1, "stream": True}
        thread = threading.Thread(target=lambda: answers.append(made.post("/v1/completions", asked)))
        thread.start()
        wait(lambda: made.engine.running == 1)
        made.server.should_exit = True
        time.sleep(0.2)
        assert thread.is_alive()
        watch.gate.set()
        thread.join(30)
        made.thread.join(30)
    text = "".join(json.loads(data)["choices"][0]["text"] for _, data in events(answers[0].text, parse=False)[:-1])
    assert text == tiny.generate(max_new_tokens=20, steps=10, seed=1).text


def test_a_slow_client_holds_up_nobody(served: Served) -> None:
    """One that reads nothing of a long answer."""
    body = json.dumps({"model": "tiny", "max_tokens": 200, "steps": 16, "alternatives": 5}).encode()
    head = f"POST /v1/dlm/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(head.encode() + body)
        assert served.post("/v1/completions", {"model": "tiny", "max_tokens": 5, "steps": 2}).status_code == 200
        wait(lambda: served.engine.running == 0)


def test_a_slow_body_is_given_up() -> None:
    with serving([make_model()], Limits(body_seconds=0.3)) as made:
        host, port = made.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            )
            connection.settimeout(10)
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")
