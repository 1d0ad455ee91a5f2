"""`response_format`: every answer is JSON of the schema, of autoregressive and of diffusion models, whatever their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.serve.protocol import json_schema
from serve.conftest import named
from serve.protocol.test_logprobs import of_bytes
from serve.serving import Served, serving, shape

pytest.importorskip("fastapi")
pytest.importorskip("interegular")
jsonschema = pytest.importorskip("jsonschema")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "kind": {"enum": ["a", "b.c"]},
        "ok": {"type": "boolean"},
        "marks": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "the"}]


def ending() -> LanguageModel:
    """An autoregressive model with a stop token."""
    lm = of_bytes(window=128)
    lm.defaults["eos_token_id"] = [lm.tokenizer.control["</s>"]]
    return lm


@pytest.fixture(scope="module")
def formed() -> Iterator[Served]:
    with serving([named(of_bytes(window=128), "ar"), named(ending(), "ends"), named(of_bytes(diffusion=True, window=128), "mask")]) as made:
        yield made


@pytest.mark.parametrize("model", ["ar", "ends", "mask"])
@pytest.mark.parametrize("seed", [1, 2])
def test_an_answer_is_json_of_the_schema(formed: Served, model: str, seed: int) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    body = {"model": model, "messages": MESSAGES, "max_tokens": 90, "temperature": 1.0, "seed": seed, "response_format": asked}
    choice = formed.post("/v1/chat/completions", body | ({"steps": 16} if model == "mask" else {})).json()["choices"][0]
    found = json.loads(choice["message"]["content"])
    jsonschema.validate(found, SCHEMA)
    assert list(found) == list(SCHEMA["properties"])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ar", "mask"])
def test_any_json_object(formed: Served, model: str) -> None:
    body = {
        "model": model,
        "messages": MESSAGES,
        "max_tokens": 20,
        "temperature": 1.0,
        "seed": 3,
        "response_format": {"type": "json_object"},
    }
    for stream in (False, True):
        if stream:
            chunks = formed.chunks("/v1/chat/completions", body)
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        else:
            text = formed.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        assert isinstance(json.loads(text), dict)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 3}, "no text of 3 tokens has the form"),
    ({"sampler": "lookup:3"}, "leave the sampler 'lookup:3' away"),
    ({"logprobs": True}, "has no logprobs"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_form_that_cannot_be_kept_is_refused(formed: Served, more: dict[str, Any], said: str) -> None:
    asked = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    answer = formed.post("/v1/chat/completions", {"model": "ar", "messages": MESSAGES, "response_format": asked} | more)
    assert answer.status_code == 400
    assert said in shape(answer.text)["message"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "object"},
        {"type": "string", "pattern": "a+"},
        {"anyOf": [{"type": "string"}]},
        {"type": ["string", "null"]},
        {"enum": []},
        {"type": "array"},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 1},
        {"type": "integer", "minimum": 3},
        {"type": "array", "items": {"type": "array", "items": {"type": "string"}, "maxItems": 32}, "maxItems": 32},
        {"type": "object", "properties": {f"a{k}": SCHEMA for k in range(8)}},
    ],
    ids=lambda wrong: str(wrong)[:60],
)
def test_a_schema_that_is_not_read_is_refused_by_its_key(formed: Served, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="JSON schema"):
        json_schema.expression(wrong)
    body = {"model": "ar", "messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {"schema": wrong}}}
    assert formed.post("/v1/chat/completions", body).status_code == 400


def test_expressions_match_what_python_writes() -> None:
    value = {"name": 'O "Romeo"\\\n', "age": -12, "kind": "b.c", "ok": False, "marks": [1.5, -2e10]}
    made = re.compile(json_schema.expression(SCHEMA))
    assert made.fullmatch(json.dumps(value))
    assert made.fullmatch(json.dumps(value, separators=(",", ":")))
    for other in (value | {"age": 1.5}, value | {"kind": "bxc"}, value | {"marks": []}, value | {"more": 1}):
        assert not made.fullmatch(json.dumps(other))
    some = re.compile(json_schema.any_object())
    assert some.fullmatch('{"a": {"b": 1}, "c": [1, "x"], "d": null}')
    assert not some.fullmatch("[1]")
