"""The server as its clients see it: OpenAI's own client, curl, native events, every error.

Shapes: B rows, Q positions.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dlm
from conftest import make_model
from dlm.chat import ChatTemplate
from dlm.language_model import LanguageModel
from dlm.serve.guard import Limits
from serve.serving import Served, curl, events, serving, wait

pytest.importorskip("fastapi")
PROMPT = "ROMEO:\n"


class Watch:
    """Counts the calls of a network and the rows in them, holds them up while its gate is shut, fails for a token."""

    def __init__(self, lm: LanguageModel) -> None:
        self.calls, self.rows, self.gate, self.poison = 0, 0, threading.Event(), None  # type: int, int, threading.Event, int | None
        self.seconds = 0.0
        self.gate.set()
        lm.network.register_forward_pre_hook(self.see)

    def see(self, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        assert self.gate.wait(30)
        time.sleep(self.seconds)
        self.calls, self.rows = self.calls + 1, self.rows + len(given[0])
        if self.poison is not None and bool((given[0] == self.poison).any()):
            raise RuntimeError("poison")


def named(lm: LanguageModel, name: str) -> LanguageModel:
    lm.name = name
    return lm


@pytest.fixture(scope="module")
def mask() -> LanguageModel:
    return dlm.load("shakespeare-mask")


@pytest.fixture(scope="module")
def models(mask: LanguageModel) -> list[LanguageModel]:
    tiny = named(make_model(window=32, context=8), "tiny")
    ar = named(make_model("autoregressive", window=32, context=8), "tiny-ar")
    ar.chat = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}:")
    uniform = make_model(noise={"process": "uniform", "schedule": "linear"})
    return [mask, tiny, ar, uniform, dlm.load("shakespeare-mask-1")]


@pytest.fixture(scope="module")
def served(models: list[LanguageModel]) -> Iterator[Served]:
    with serving(models, max_batch=8, max_queue=4) as made:
        yield made


@pytest.fixture(scope="module")
def watch(models: list[LanguageModel]) -> Watch:
    """Of the model `tiny`."""
    return Watch(models[1])


@pytest.fixture(scope="module")
def watch_ar(models: list[LanguageModel]) -> Watch:
    return Watch(models[2])


@pytest.fixture
def openai(served: Served) -> Iterator[Any]:
    client = pytest.importorskip("openai").OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with client:
        yield client


# --- OpenAI's client ---------------------------------------------------------------------------------------------


def test_models_are_listed(openai: Any, models: list[LanguageModel]) -> None:
    listed = openai.models.list().data
    assert [model.id for model in listed] == [lm.name for lm in models]
    facts = {model.id: model.dlm for model in listed}
    assert facts["shakespeare-mask"]["window"] == 256 and facts["shakespeare-mask"]["infills"]
    assert facts["tiny-ar"]["kind"] == "autoregressive" and not facts["tiny-ar"]["infills"]
    assert facts["tiny-uniform"]["noise"] == "uniform"
    assert openai.models.retrieve("tiny").id == "tiny"
    for lm in models:  # each sampler that is offered can be used
        for sampler in facts[lm.name]["samplers"]:
            lm.sampler(sampler=sampler["name"])
            assert len(sampler["about"]) > 20


@pytest.mark.parametrize(
    ("model", "sampler"), [("shakespeare-mask", None), ("tiny-ar", None), ("tiny-ar", "lookup:3"), ("tiny", "speculative")]
)
def test_a_completion_is_the_text_of_the_library(openai: Any, models: list[LanguageModel], model: str, sampler: str | None) -> None:
    """Whole and in chunks."""
    lm = next(lm for lm in models if lm.name == model)
    steps = {"steps": 8} if lm.is_diffusion else {}
    expected = [lm.generate(PROMPT, max_new_tokens=20, seed=seed, sampler=sampler, **steps) for seed in (5, 6)]
    extra = {"sampler": sampler, **steps}
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 20, "seed": 5, "n": 2, "extra_body": extra}
    whole = openai.completions.create(**asked)
    assert [choice.text for choice in whole.choices] == [one.text[len(PROMPT) :] for one in expected]
    assert [choice.finish_reason for choice in whole.choices] == ["length"] * 2
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 40, 47)
    assert usage.forwards == sum(one.forwards for one in expected)
    texts = ["", ""]
    for chunk in openai.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert chunk.usage.completion_tokens == 40 and not chunk.choices


def test_several_prompts_echo_and_logprobs(openai: Any, mask: LanguageModel) -> None:
    prompts = ["First ", "Second "]
    asked = {"prompt": prompts, "max_tokens": 6, "seed": 3, "echo": True, "logprobs": 2, "extra_body": {"steps": 6}}
    whole = openai.completions.create(model="shakespeare-mask", **asked)
    for row, (prompt, choice) in enumerate(zip(prompts, whole.choices, strict=True)):
        assert choice.text == mask.generate(prompt, max_new_tokens=6, seed=3 + row, steps=6).text
        said = choice.logprobs
        assert "".join(said.tokens) == choice.text[len(prompt) :]
        assert said.text_offset == [len(prompt) + k for k in range(6)]
        for token, logprob, top in zip(said.tokens, said.token_logprobs, said.top_logprobs, strict=True):
            assert logprob <= 0 and len(top) == 2 and logprob <= max(top.values()) + 1e-6
            assert token not in top or math.isclose(top[token], logprob, rel_tol=1e-5)


def test_tokens_as_prompt(served: Served, mask: LanguageModel) -> None:
    ids = mask.tokenizer.encode(PROMPT)
    asked = {"max_tokens": 5, "seed": 1, "steps": 4}
    by_text = served.post("/v1/completions", asked | {"prompt": PROMPT}).json()["choices"]
    assert served.post("/v1/completions", asked | {"prompt": ids}).json()["choices"] == by_text
    assert served.post("/v1/completions", asked | {"prompt": [ids]}).json()["choices"] == by_text


def test_a_suffix_is_led_to(openai: Any, mask: LanguageModel) -> None:
    whole = openai.completions.create(
        model="shakespeare-mask", prompt="To be", suffix=" the question", max_tokens=9, seed=2, extra_body={"steps": 9}
    )
    expected = mask.generate("To be", suffix=" the question", max_new_tokens=9, seed=2, steps=9).text
    assert "To be" + whole.choices[0].text + " the question" == expected
    assert whole.usage.prompt_tokens == len("To be the question") and whole.usage.completion_tokens == 9


def test_a_prompt_that_looks_like_noise_is_text(served: Served) -> None:
    answer = served.post("/v1/completions", {"prompt": "a █ b", "max_tokens": 3})
    assert answer.status_code == 400 and "no token for '█'" in answer.json()["error"]["message"]
    begin = served.native({"model": "tiny", "prompt": "MASK", "max_tokens": 2, "steps": 2})[0][1]
    assert begin["states"] == "ggggnn" and begin["mask_id"] not in [token for token, _ in begin["tokens"][:4]]


# --- streaming ---------------------------------------------------------------------------------------------------


def test_diffusing_chunks_hold_the_whole_text(served: Served) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 16, "seed": 4, "steps": 6}
    whole = served.post("/v1/completions", asked).json()["choices"][0]["text"]
    chunks = served.chunks("/v1/completions", asked | {"diffusing": True})
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert texts[-1] == whole and all(len(text) == 16 for text in texts)
    counts = [text.count("█") for text in texts]
    assert counts == sorted(counts, reverse=True) and counts[0] > 0 == counts[-1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("model", ["shakespeare-mask", "tiny-uniform", "tiny-ar"])
def test_what_is_streamed_is_never_taken_back(served: Served, model: str) -> None:
    asked = {"model": model, "prompt": "a", "max_tokens": 40, "seed": 4} | ({"steps": 12} if model != "tiny-ar" else {})
    whole = served.post("/v1/completions", asked).json()["choices"][0]["text"]
    deltas = [chunk["choices"][0]["text"] for chunk in served.chunks("/v1/completions", asked)]
    assert "".join(deltas) == whole and len(whole) == 40
    assert len([delta for delta in deltas if delta]) > (0 if model == "tiny-uniform" else 1)


@pytest.mark.parametrize("model", ["shakespeare-mask", "tiny-ar"])
def test_a_stop_string_is_never_begun(served: Served, model: str) -> None:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 24, "seed": 4} | ({"steps": 24} if model != "tiny-ar" else {})
    whole = served.post("/v1/completions", asked).json()
    text = whole["choices"][0]["text"]
    stop = text[10:13]
    expected = text[: text.index(stop)]
    cut = served.post("/v1/completions", asked | {"stop": [stop, "never there"]}).json()
    assert cut["choices"][0]["text"] == expected and cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] == len(expected) < 24
    assert cut["usage"]["forwards"] <= whole["usage"]["forwards"]
    shown = ""
    for chunk in served.chunks("/v1/completions", asked | {"stop": stop}):
        shown += chunk["choices"][0]["text"]
        assert expected.startswith(shown)
    assert shown == expected


@pytest.mark.parametrize("extra", [{}, {"sampler": "lookup:3"}], ids=str)
def test_a_conversation(openai: Any, models: list[LanguageModel], extra: dict[str, Any]) -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    asked = {"model": "tiny-ar", "messages": messages, "max_tokens": 12, "seed": 3, "extra_body": extra}
    whole = openai.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    expected = models[2].generate("be\nhello\n:", max_new_tokens=12, seed=3).text
    text = whole.choices[0].message.content
    assert expected.endswith(text) and len(text) == 12 and whole.choices[0].message.role == "assistant"
    said = whole.choices[0].logprobs.content
    assert "".join(one.token for one in said) == text and all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in said)
    chunks = list(openai.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    shown = [
        chunk.choices[0].delta.content
        for chunk in openai.chat.completions.create(**asked | {"extra_body": extra | {"diffusing": True}}, stream=True)
    ]
    assert shown[-1] == text and all(one is not None for one in shown)


def test_an_end_token_ends_the_text(served: Served, models: list[LanguageModel]) -> None:
    lm = models[2]
    asked = {"model": "tiny-ar", "prompt": "a", "max_tokens": 60, "seed": 3}
    text = served.post("/v1/completions", asked).json()["choices"][0]["text"]
    lm.defaults["eos_token_id"] = lm.tokenizer.encode(text[30])
    try:
        answer = served.post("/v1/completions", asked | {"temperature": 1.0, "sampler": "lookup:2"}).json()
        expected = text[: text.index(text[30])]
        assert answer["choices"][0]["text"] == expected and answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == len(expected)
        told = served.native(asked | {"sampler": "lookup:3"})
        assert told[-1][1]["text"] == "a" + expected and told[-1][1]["finish_reason"] == "stop"
    finally:
        del lm.defaults["eos_token_id"]


def test_chat_needs_a_template(served: Served) -> None:
    answer = served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
    assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]


# --- native events -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("shakespeare-mask", {"steps": 8}),
        ("shakespeare-mask", {"steps": 8, "sampler": "remdm-conf"}),
        ("shakespeare-mask", {"steps": 8, "schedule": "L0.5 H0.5", "light": "shakespeare-mask-1"}),
        ("tiny-uniform", {"steps": 8}),
        ("tiny-ar", {"sampler": "lookup:4"}),
        ("tiny", {"sampler": "speculative:3"}),
    ],
    ids=str,
)
def test_native_events_tell_the_run(served: Served, models: list[LanguageModel], model: str, options: dict[str, Any]) -> None:
    """Played one by one they end in the text of the library; states go forward; what is settled does not change."""
    lm = next(lm for lm in models if lm.name == model)
    prompt = "aaaaaaaa"
    told = served.native({"model": model, "prompt": prompt, "max_tokens": 20, "seed": 9, "alternatives": 2, **options})
    expected = lm.generate(prompt, max_new_tokens=20, seed=9, **options)
    (first, begin), (last, end) = told[0], told[-1]
    assert (first, last) == ("begin", "end") and {name for name, _ in told[1:-1]} == {"step"}
    state, texts, ids = list(begin["states"]), [text for _, text in begin["tokens"]], [token for token, _ in begin["tokens"]]
    assert begin["states"] == "g" * 8 + "n" * 20 and "".join(texts[:8]) == prompt
    confident = 0
    for _, step in told[1:-1]:
        fresh = [i for i, letter in enumerate(state) if letter == "f"]
        for i in fresh:
            state[i] = "c"
        for i, token, text, letter, confidence, others in step["changed"]:
            assert state[i] not in "gc", "settled text was changed"
            state[i], texts[i], ids[i] = letter, text, token
            assert letter in "ndfx"
            if confidence is not None:
                confident += 1
                assert 0 <= confidence <= 1 and len(others) == 2 and others[0][1] >= others[1][1] and confidence <= others[0][1] + 1e-4
    assert set(state[8:]) <= {"f", "c"} and "".join(texts) == end["text"] == expected.text
    assert end["usage"]["forwards"] == told[-2][1]["forwards"] == expected.forwards
    assert end["usage"]["completion_tokens"] == expected.tokens == 20 and end["finish_reason"] == "length"
    assert confident >= (0 if options.get("sampler", "").startswith("speculative") else 20)
    if "light" in options:
        assert [step["model"] for _, step in told[1:-1]] == sorted((step["model"] for _, step in told[1:-1]), key="LH".index)


def test_a_canvas_keeps_what_is_locked(served: Served, mask: LanguageModel) -> None:
    first = served.native({"prompt": "Now is", "max_tokens": 12, "steps": 6, "seed": 1})[-1][1]["text"]
    ids = mask.tokenizer.encode(first)
    holes = {7, 8, 12, 13}
    canvas = [None if i in holes else token for i, token in enumerate(ids[:16])] + ["end"]
    told = served.native({"canvas": canvas, "steps": 6, "seed": 2})
    text = told[-1][1]["text"]
    assert len(text) == 19 and text.endswith("end")
    assert all(text[i] == first[i] for i in range(16) if i not in holes)
    assert told[-1][1]["usage"]["prompt_tokens"] == 15 and told[0][1]["states"].count("n") == 4


def test_refused_proposals_are_struck(served: Served) -> None:
    told = served.native({"model": "tiny-ar", "prompt": "ababab", "max_tokens": 25, "seed": 1, "sampler": "lookup:4"})
    marks = [letter for name, step in told if name == "step" for *_, letter, _, _ in step["changed"]]
    assert marks.count("d") > 5 and marks.count("x") > 5 and marks.count("f") == 25


def test_lossless_is_the_law_in_fewer_calls(served: Served, models: list[LanguageModel]) -> None:
    asked = {"model": "tiny-ar", "prompt": "ab" * 5, "max_tokens": 20, "seed": 1, "temperature": 0.0}
    plain, fast = (served.post("/v1/completions", asked | more).json() for more in ({}, {"lossless": True}))
    assert plain["choices"] == fast["choices"] and fast["usage"]["forwards"] < plain["usage"]["forwards"] == 20
    assert fast["dlm"]["sampler"] == "lookup:4"
    assert served.post("/v1/completions", {"prompt": "a", "max_tokens": 4, "lossless": True}).json()["dlm"]["sampler"] == "speculative"
    refused = served.post("/v1/completions", {"prompt": "a", "lossless": True, "sampler": "confidence"})
    assert refused.status_code == 400 and "approximates" in refused.json()["error"]["message"]


# --- curl --------------------------------------------------------------------------------------------------------


def test_curl(served: Served) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 8, "steps": 4, "seed": 1}
    status, text = curl(f"{served.url}/v1/completions", body=json.dumps(asked).encode())
    whole = json.loads(text)
    assert status == 200 and len(whole["choices"][0]["text"]) == 8 and whole["object"] == "text_completion"
    status, text = curl(f"{served.url}/v1/completions", "-N", body=json.dumps(asked | {"stream": True}).encode())
    *chunks, (_, done) = events(text, parse=False)
    assert status == 200 and done == "[DONE]"
    assert "".join(json.loads(data)["choices"][0]["text"] for _, data in chunks) == whole["choices"][0]["text"]


# --- errors ------------------------------------------------------------------------------------------------------

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
    ("/v1/completions", {"max_tokens": "many"}, 400),
    ("/v1/completions", {"steps": 0}, 400),
    ("/v1/completions", {"steps": 10**9}, 400),
    ("/v1/completions", {"temperature": -1}, 400),
    ("/v1/completions", {"top_p": 0}, 400),
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
    ("/v1/nothing", {}, 405),
]


def shape(text: str) -> dict[str, Any]:
    """The one shape of all errors."""
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and "\n" not in error["message"]
    return dict(error)


@pytest.mark.parametrize(("path", "body", "status"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_told_what_is_wrong(served: Served, path: str, body: Any, status: int) -> None:
    for stream in (False, True):
        if stream and not (isinstance(body, dict) and path in ("/v1/completions", "/v1/chat/completions")):
            continue
        answer = served.post(path, body | {"stream": True} if stream else body)
        assert answer.status_code == status, answer.text
        shape(answer.text)


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

    before = [value(name) for name in ("dlm_engine_tokens_total", "dlm_engine_calls_total", "dlm_first_token_seconds_count")]
    served.post("/v1/completions", {"model": "tiny-ar", "prompt": "a", "max_tokens": 7})
    after = [value(name) for name in ("dlm_engine_tokens_total", "dlm_engine_calls_total", "dlm_first_token_seconds_count")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [7, 7, 1]
    assert value('dlm_requests_total{path="/v1/completions",status="200"}') >= 1
    assert value("dlm_engine_running") == 0


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


# --- a busy server -----------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again(served: Served, watch: Watch) -> None:
    watch.gate.clear()
    asked = {"model": "tiny", "max_tokens": 4, "steps": 2, "n": 12}
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(served.post("/v1/completions", asked)))
    try:
        waiting.start()
        wait(lambda: served.engine.running + served.engine.waiting == 12)
        refused = served.post("/v1/completions", asked | {"n": 1})
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert shape(refused.text)["code"] == "queue_full"
    finally:
        watch.gate.set()
        waiting.join(30)
    assert answers[0].status_code == 200 and len(answers[0].json()["choices"]) == 12


def test_a_deadline_ends_a_request() -> None:
    slow = make_model(window=32)
    Watch(slow).seconds = 0.05
    with serving([slow], Limits(deadline=0.3)) as made:
        asked = {"max_tokens": 30, "steps": 30, "sampler": "first-hitting"}
        answer = made.post("/v1/completions", asked)
        assert answer.status_code == 504 and shape(answer.text)["code"] == "deadline_exceeded"
        told = made.native(asked)
        assert told[0][0] == "begin" and told[-1][0] == "error" and told[-1][1]["error"]["code"] == "deadline_exceeded"
        wait(lambda: not made.engine.running)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(served: Served, watch: Watch, stream: bool) -> None:
    """Within one call of the network."""
    asked = {"model": "tiny", "max_tokens": 300, "steps": 256, "sampler": "first-hitting", "stream": stream}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = served.url.removeprefix("http://").split(":")
    begun = watch.calls
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait(lambda: watch.calls > begun + 2)
        watch.gate.clear()
        connection.shutdown(socket.SHUT_RDWR)
    cancelled = served.engine.counts.cancelled
    time.sleep(0.2)  # the server hears of it
    calls = watch.calls
    watch.gate.set()
    wait(lambda: served.engine.running == 0)
    assert watch.calls - calls <= 2 and served.engine.counts.cancelled == cancelled + 1


def test_one_broken_request_harms_no_other(served: Served, watch: Watch, models: list[LanguageModel]) -> None:
    """A call that fails for all is repeated for each alone; the guilty one fails, the others get the text that they get alone."""
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
    assert answers[2].status_code == 500 and shape(answers[2].text)["code"] == "internal_error"
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
    alone = []
    calls = sum(network.calls for network in networks)
    for one in asked:
        alone.append(served.post("/v1/completions", one).json())
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
