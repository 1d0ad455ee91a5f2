"""What the server refuses and how it says so; its keys, its metrics."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import make_model
from dlm.serve.guard import Limits
from serve.serving import Served, serving, shape, wait

pytest.importorskip("fastapi")

JSON = {"Content-Type": "application/json"}
BAD: list[tuple[str, Any, int]] = [
    ("/v1/completions", {"model": "nobody"}, 404),
    ("/v1/completions", {"model": "../shakespeare-mask"}, 404),
    ("/v1/completions", {"model": "/etc/passwd"}, 404),
    ("/v1/completions", {"prompt": 7}, 400),
    ("/v1/completions", {"prompt": [70]}, 400),
    ("/v1/completions", {"prompt": ["a"] * 17}, 400),
    ("/v1/completions", {"prompt": ["a"] * 5, "n": 4}, 400),
    ("/v1/completions", {"max_tokens": -1}, 400),
    ("/v1/completions", {"max_tokens": 0}, 400),
    ("/v1/completions", {"max_tokens": 1000}, 400),
    ("/v1/completions", {"max_tokens": 10**30}, 400),
    ("/v1/completions", {"max_tokens": 2**31 - 1}, 400),
    ("/v1/chat/completions", {"model": "tiny-ar", "messages": [{"role": "user"}], "max_completion_tokens": 2**31 - 1}, 400),
    ("/v1/dlm/generate", {"length": 2**31 - 1}, 400),
    ("/v1/completions", {"max_tokens": "many"}, 400),
    ("/v1/completions", {"steps": 0}, 400),
    ("/v1/completions", {"steps": 10**9}, 400),
    ("/v1/completions", {"temperature": -1}, 400),
    ("/v1/completions", {"top_p": 0}, 400),
    ("/v1/completions", {"top_k": -1}, 400),
    ("/v1/completions", {"sampler": "nothing"}, 400),
    ("/v1/completions", {"sampler": "confidence:x"}, 400),
    ("/v1/completions", {"model": "tiny-ar", "sampler": "draft:/etc/passwd"}, 400),
    ("/v1/completions", {"model": "tiny-ar", "sampler": "draft:shakespeare-ar"}, 400),
    ("/v1/completions", {"model": "tiny-ar", "prompt": "a", "suffix": "b"}, 400),
    ("/v1/completions", {"schedule": "L0.5 H0.5", "light": "/tmp"}, 400),
    ("/v1/completions", {"schedule": "L0.5 H0.5"}, 400),
    ("/v1/completions", {"light": "tiny", "schedule": "L0.5 H0.5"}, 400),
    ("/v1/completions", {"stop": ["a"] * 17}, 400),
    ("/v1/completions", {"frequency_penalty": 0.5}, 400),
    ("/v1/completions", {"typo": 1}, 400),
    ("/v1/completions", {"seed": 2**70}, 400),
    ("/v1/completions", [], 400),
    ("/v1/chat/completions", {}, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user"}], "tools": [{}]}, 400),
    ("/v1/dlm/generate", {"canvas": []}, 400),
    ("/v1/dlm/generate", {"canvas": [1, 2]}, 400),
    ("/v1/dlm/generate", {"canvas": [None, 65]}, 400),
    ("/v1/dlm/generate", {"canvas": [None, -1]}, 400),
    ("/v1/dlm/generate", {"canvas": [None], "prompt": "a"}, 400),
    ("/v1/dlm/generate", {"prompt": "a", "length": 1}, 400),
    ("/v1/dlm/generate", {"alternatives": 50}, 400),
    ("/v1/dlm/export", {"format": "exe"}, 400),
    ("/v1/dlm/export", {"format": "html"}, 400),
    ("/v1/nothing", {}, 404),
]


@pytest.mark.parametrize(("path", "body", "status"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_told_what_is_wrong(served: Served, path: str, body: Any, status: int) -> None:
    for stream in (False, True):
        if stream and not (isinstance(body, dict) and path in ("/v1/completions", "/v1/chat/completions")):
            continue
        answer = served.post(path, body | {"stream": True} if stream else body)
        assert answer.status_code == status, answer.text
        shape(answer.text)


NEAREST: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1}, "unknown field 'temprature'; did you mean temperature?"),
    ({"sampler": "entopy"}, "did you mean entropy"),
    ({"model": "tiny-arr"}, "the model 'tiny-arr' is not served here; did you mean tiny-ar?"),
]


@pytest.mark.parametrize(("fields", "told"), NEAREST)
def test_a_misspelt_name_is_told_the_nearest(served: Served, fields: dict[str, Any], told: str) -> None:
    assert told in shape(served.post("/v1/completions", {"prompt": "a"} | fields).text)["message"]


def test_the_limit_of_tokens_is_one_number(served: Served) -> None:
    """The server's own, in the message whichever way it is passed."""
    said = [
        shape(served.post("/v1/completions", body).text)["message"] for body in ({"max_tokens": 5000}, {"max_tokens": 510, "prompt": "abc"})
    ]
    assert said[0] == "max_tokens 5000: this server writes 512 tokens at most, the prompt included"
    assert "this server writes 512 at most" in said[1]


RAW: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b'{"prompt": "\xff\xfe"}', 400),
    (b'{"prompt": "\\ud800"}', 400),
    (b'{"temperature": NaN}', 400),
    (b'{"temperature": 1e999}', 400),
    (b"[" * 100_000, 400),
    (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413),
    (b'{"prompt": "' + b"a" * 1_000_000 + b'"}', 400),
]


@pytest.mark.parametrize(("body", "status"), RAW, ids=lambda value: str(value)[:24])
def test_a_body_that_is_no_request(served: Served, body: bytes, status: int) -> None:
    """Also in pieces of no announced size."""
    for content in (body, iter([body[:100], body[100:]])):
        answer = served.client.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == status, answer.text
        shape(answer.text)


def test_other_mistakes(served: Served) -> None:
    assert shape(served.client.get("/v1/models/nobody").text)["code"] == "model_not_found"
    for answer, status in (
        (served.client.get("/nothing/here"), 404),
        (served.client.get("/..%2f..%2fpyproject.toml"), 404),
        (served.client.delete("/v1/models"), 405),
        (served.client.get("/v1/models", headers={"Host": "evil.example"}), 400),
        (served.client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}), 400),
    ):
        assert answer.status_code == status, answer.text
        shape(answer.text)
    assert served.client.get("/healthz").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_metrics_count(served: Served) -> None:
    def value(name: str) -> float:
        lines = served.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    names = ("dlm_engine_tokens_total", "dlm_engine_calls_total", "dlm_first_token_seconds_count")
    before = [value(name) for name in names]
    served.post("/v1/completions", {"model": "tiny-ar", "prompt": "a", "max_tokens": 7})
    wait(lambda: value(names[0]) > before[0])  # counted once the answer is out
    assert [value(name) - b for name, b in zip(names, before, strict=True)] == [7, 7, 1]
    assert value('dlm_requests_total{path="/v1/completions",status="200"}') >= 1
    wait(lambda: value("dlm_engine_running") == 0)


def test_keys_protect_what_they_should() -> None:
    tiny = make_model()
    with serving([tiny], Limits(keys=("first", "second"))) as locked:
        for key, status in ((None, 401), ("wrong", 401), ("first", 200), ("second", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            for path in ("/v1/models", "/metrics"):
                assert locked.client.get(path, headers=headers).status_code == status
            answer = locked.post("/v1/completions", {"max_tokens": 2}, headers=headers)
            assert answer.status_code == status
            if status == 401:
                assert shape(answer.text)["code"] == "invalid_api_key"
        assert locked.client.get("/healthz").status_code == 200
