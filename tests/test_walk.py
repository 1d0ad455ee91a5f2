"""Golden LLaDA through every door, as a new user takes them: generate, chat, the server, the page's API, calibration. No door changes its
text."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import dlm as library
from conftest import Dlm, make_model
from dlm.formats.native import ModelConfig
from dlm.language_model import LanguageModel
from dlm.language_model.options import DecodingOptions
from dlm.models.transformer import Transformer
from dlm.text.tokenizer import Tokenizer
from goldens import GOLDEN, model

if TYPE_CHECKING:
    from serve.serving import Served

DIRECTORY, QUESTION, NEW, SEED = str(GOLDEN / "llada"), "世界 🙂?", 12, 0


@pytest.fixture(scope="module")
def answer() -> str:
    """Of the library, to the question, up to its end."""
    lm = model("llada")
    canvas = lm.chat_canvas([{"role": "user", "content": QUESTION}], max_new_tokens=NEW)
    run = lm.run(canvas, DecodingOptions(temperature=1.0), seed=SEED)
    run.finish()
    ids = run.trajectory.current_BT[0].tolist()[-NEW:]
    text = lm.tokenizer.decode(ids[: next((n for n, i in enumerate(ids) if i in lm.stops), NEW)])
    assert "8" in text  # the model answers
    return text


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    pytest.importorskip("fastapi")
    from serve.serving import serving

    with serving([model("llada")], max_batch=4) as made:
        yield made


def test_watched_in_the_terminal(dlm: Dlm) -> None:
    code, out, err = dlm("generate", QUESTION, DIRECTORY, "--watch", "--max-new-tokens", str(NEW), "--sampler", "topk")
    assert code == 0, err
    found = model("llada").generate(QUESTION, max_new_tokens=NEW, sampler="topk")
    assert found.text.startswith(QUESTION)
    assert len(found.text) > len(QUESTION)
    assert found.text in out
    assert f"in {found.forwards} forward passes" in err + out


def test_chat(dlm: Dlm, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\n{QUESTION}\n"))
    code, out, err = dlm("chat", DIRECTORY, "--max-new-tokens", str(NEW), "--temperature", "1", "--seed", str(SEED))
    assert (code, err) == (0, "")
    assert out == answer + "\n"


def test_the_server_answers_whole_and_in_chunks(served: Served, answer: str) -> None:
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": NEW,
        "temperature": 1.0,
        "seed": SEED,
    }
    told = served.post("/v1/chat/completions", body).json()
    assert told["choices"][0]["message"]["content"] == answer
    parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in served.chunks("/v1/chat/completions", body) if chunk["choices"]]
    assert "".join(parts) == answer


def test_the_page_shows_every_token(served: Served) -> None:
    """Its API: events of the native protocol, characters of several tokens whole."""
    body: dict[str, Any] = {"prompt": QUESTION, "max_tokens": NEW, "sampler": "topk", "seed": 3}
    events = served.native(body)
    expected = model("llada").generate(QUESTION, max_new_tokens=NEW, sampler="topk", seed=3)
    names = [name for name, _ in events]
    assert (names[0], set(names[1:-1]), names[-1]) == ("begin", {"step"}, "end")
    # the tokens after the end of the text are cancelled without a forward pass
    assert sorted({data["forwards"] for _, data in events[1:-1]}) == list(range(1, expected.forwards + 1))
    assert events[-1][1]["text"] == expected.text


@pytest.mark.parametrize(
    "body", [{"prompt": "a", "sampler": "nothing"}, {"prompt": "a", "max_tokens": 10_000}, {"prompt": "a", "model": "dream"}]
)
def test_the_server_refuses_in_one_line(served: Served, body: dict[str, Any]) -> None:
    from serve.serving import shape

    answer = served.post("/v1/completions", body)
    assert answer.status_code in (400, 404)
    assert shape(answer.text)["message"]


def judge(directory: Path) -> Path:
    """An autoregressive model of bytes, which reads any text."""
    tokenizer, tiny = Tokenizer.bytes(), make_model("autoregressive", window=256)
    shape = replace(tiny.config.network, vocab_size=tokenizer.ids)
    lm = LanguageModel(Transformer(shape).eval(), ModelConfig(shape, tokenizer.mask_id, "autoregressive"), tokenizer)
    lm.save_pretrained(directory)
    return directory


def test_calibrated_and_then_automatic(dlm: Dlm, tmp_path: Path) -> None:
    shutil.copytree(DIRECTORY, tmp_path / "llada")
    twin = str(judge(tmp_path / "bytes"))
    assert "needs a measurement of this model: run dlm calibrate llada" in dlm.told("generate", "the", "llada", "--sampler", "auto")
    code, out, err = dlm("calibrate", "llada", "--judge", twin, "--samples", "2", "--length", "16", "--quick", "--json")
    assert code == 0, err
    made = json.loads(out.splitlines()[-1])
    assert {row["options"]["sampler"] for row in made["rows"]} > {"first-hitting"}
    assert made["made"]["length"] == 16
    lm = library.load("llada")
    assert lm.path is not None
    chosen = lm.generate("the", sampler="auto", budget="calls:4", max_new_tokens=16)
    assert chosen.forwards <= 4
    code, out, err = dlm("generate", "the", "llada", "--sampler", "auto", "--budget", "calls:4", "--max-new-tokens", "16")
    assert code == 0, err


@pytest.mark.parametrize(
    ("name", "text", "estimator"),
    [
        ("llada", "the worst and an ou 世界\n" * 40, "any-order"),
        ("sdar", "the worst\n" * 60, "block-wise"),
        ("gidd", "17 3 99 4 " * 40, "counted"),
    ],
)
def test_a_text_is_measured_by_the_byte(name: str, text: str, estimator: str, dlm: Dlm) -> None:
    Path("text.txt").write_text(text, encoding="utf-8")
    code, out, err = dlm(
        "eval",
        str(GOLDEN / name),
        "--data",
        "text.txt",
        "--split",
        "all",
        "--passes",
        "3",
        "--max-windows",
        "2",
        "--json",
        "--card",
        "a.json",
    )
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert (found["estimator"], found["samples"], found["is_bound"]) == (estimator, 3, True)
    assert found["bits_per_byte"] > 0
    assert found["bits_per_byte"] < found["bits_per_char"] if "世" in text else found["bits_per_byte"] == found["bits_per_char"]
    assert found["stderr"] > 0
