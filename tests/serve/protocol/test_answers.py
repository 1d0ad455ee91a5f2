"""A conversation is answered alike in chat, on the server and on its page: by its template, with the sampling of the base, to its end."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dlm.serve
from conftest import Dlm, make_model
from dlm import bundled
from dlm.language_model import LanguageModel
from dlm.language_model.options import DecodingOptions
from dlm.sampling.draw import Draw
from dlm.text.chat import ChatTemplate
from serve.conftest import named
from serve.protocol.test_logprobs import of_bytes
from serve.serving import Served, serving, shape

pytest.importorskip("fastapi")

MESSAGES = [{"role": "user", "content": "But soft,"}]
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}<s>"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """It ends its answer with the fifth token that it likes best."""
    lm = named(of_bytes(), "answers")
    lm.chat = ChatTemplate(TEMPLATE)
    canvas = lm.chat_canvas(MESSAGES, max_new_tokens=12)
    *_, frame = lm.stream(canvas=canvas, temperature=0.0)
    lm.defaults["eos_token_id"] = [frame.tokens_BT[0, int(canvas.given_BT.sum()) + 4].item()]
    return lm


@pytest.fixture(scope="module")
def answering(model: LanguageModel) -> Iterator[Served]:
    with serving([model, named(make_model(), "tiny")]) as made:
        yield made


def shown(events: list[tuple[str, dict[str, Any]]]) -> tuple[list[str], str]:
    """The text and the state of every position at the end."""
    begin = events[0][1]
    texts, states = [text for _, text in begin["tokens"]], list(begin["states"])
    for name, data in events:
        for position, _, text, state, *_ in data["changed"] if name == "step" else ():
            texts[position], states[position] = text, state
    return texts, "".join(states)


def test_the_page_and_a_chat_get_one_answer(answering: Served, model: LanguageModel) -> None:
    body = {"model": "answers", "messages": MESSAGES, "max_tokens": 12}
    choice = answering.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    ids = model.prompting.conversation(MESSAGES)
    *_, frame = model.stream([ids], max_new_tokens=12, temperature=0.0)
    expected = model.tokenizer.decode(frame.tokens_BT[0, len(ids) : len(ids) + 4].tolist())
    assert choice["message"]["content"] == expected
    events = answering.native(body)
    texts, states = shown(events)
    assert "".join(texts) == expected == events[-1][1]["text"]
    assert set(states) <= set("gfc")  # all of it settled, although the text is shorter than its place
    assert events[-1][1]["finish_reason"] == "stop"
    assert events[-1][1]["usage"]["completion_tokens"] == 5


def test_an_answer_is_drawn_as_its_base_says(answering: Served, model: LanguageModel) -> None:
    def draw(lm: LanguageModel, **options: Any) -> Draw:
        return lm.resolve(lm.for_chat(DecodingOptions(**options))).draw

    assert draw(model) == Draw(0.0)
    assert draw(model, temperature=0.7, top_p=0.5) == Draw(0.7, 0, 0.5)
    base = named(of_bytes(), "base")
    base.chat_sampling = {"temperature": 0.2, "top_p": 0.9}
    assert draw(base) == Draw(0.2, 0, 0.9)
    assert draw(base, temperature=1.0) == Draw(1.0, 0, 0.9)
    base.defaults = {"temperature": 0.6, "top_k": 20}
    assert draw(base) == Draw(0.6, 20)
    body = {"model": "answers", "messages": MESSAGES, "max_tokens": 12}
    texts = {answering.post("/v1/chat/completions", body | {"seed": seed}).json()["choices"][0]["message"]["content"] for seed in range(4)}
    assert len(texts) == 1
    assert len({answering.native(body | {"seed": seed})[-1][1]["text"] for seed in range(4)}) == 1


def test_a_fetched_base_has_the_sampling_of_its_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bundled, "cache_directory", lambda: tmp_path)
    assert set(bundled.CHAT_SAMPLING) == set(bundled.BASES)
    for name, sampling in bundled.CHAT_SAMPLING.items():
        assert bundled.chat_sampling(tmp_path / f"{name}.gguf") == sampling
        assert bundled.chat_sampling(Path("elsewhere") / f"{name}.gguf") == {}


def test_chat_says_the_same_as_the_server(answering: Served, model: LanguageModel, dlm: Dlm, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from dlm.cli import chat

    monkeypatch.setattr(chat, "load", lambda *_, **__: model)
    monkeypatch.setattr("sys.stdin", io.StringIO("But soft,\n"))
    code, out, err = dlm("chat", "answers", "--max-new-tokens", "12")
    assert code == 0, err
    body = {"model": "answers", "messages": MESSAGES, "max_tokens": 12}
    assert out == answering.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] + "\n"


def test_no_tools_are_accepted_and_some_refused(answering: Served) -> None:
    body = {"model": "answers", "messages": MESSAGES, "max_tokens": 3}
    taken: list[dict[str, Any]] = [{"tools": []}, {"tools": [], "tool_choice": "none"}, {"tool_choice": "auto"}, {"tools": None}]
    for more in taken:
        assert answering.post("/v1/chat/completions", body | more).status_code == 200
    refused: list[dict[str, Any]] = [{"tools": [{"type": "function"}]}, {"tool_choice": "required"}]
    for more in refused:
        shape(answering.post("/v1/chat/completions", body | more).text)
        assert answering.post("/v1/chat/completions", body | more).status_code == 400


WRONG: list[dict[str, Any]] = [{"messages": MESSAGES, "prompt": "a"}, {"messages": []}, {"messages": MESSAGES, "model": "tiny"}]


@pytest.mark.parametrize("body", WRONG, ids=str)
def test_messages_stand_alone_and_need_a_template(answering: Served, body: dict[str, Any]) -> None:
    answer = answering.post("/v1/dlm/generate", body)
    assert answer.status_code == 400
    shape(answer.text)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_asks_a_chat_model_through_its_template() -> None:
    path = Path(dlm.serve.__file__).parent / "page" / "prompt.js"
    script = f"""
    import {{ body }} from {json.dumps(path.as_uri())};
    const chat = {{ dlm: {{ chat: true, kind: "autoregressive" }} }}, plain = {{ dlm: {{ chat: false, kind: "diffusion" }} }};
    const made = [body({{ length: 9 }}, "who?", null, chat), body({{}}, "who?", null, plain), body({{}}, "a [3]", null, chat)];
    console.log(JSON.stringify(made));
    """
    done = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    asked, plain, holes = json.loads(done.stdout)
    assert asked == {"alternatives": 3, "messages": [{"role": "user", "content": "who?"}], "max_tokens": 9}
    assert plain == {"alternatives": 3, "prompt": "who?"}
    assert holes == {"alternatives": 3, "canvas": ["a ", None, None, None]}
