"""The server as its clients see it: OpenAI's own client, curl, native events.

Shapes: B rows, Q positions.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from dlm.language_model import LanguageModel
from dlm.language_model.options import TextKeywords
from serve.serving import Served, curl, events

pytest.importorskip("fastapi")
PROMPT = "ROMEO:\n"

# --- OpenAI's client ---------------------------------------------------------------------------------------------


def test_models_are_listed(openai: Any, models: list[LanguageModel]) -> None:
    listed = openai.models.list().data
    assert [model.id for model in listed] == [lm.name for lm in models]
    facts = {model.id: model.dlm for model in listed}
    assert facts["shakespeare-mask"]["window"] == 256
    assert facts["shakespeare-mask"]["infills"]
    assert facts["tiny-ar"]["kind"] == "autoregressive"
    assert not facts["tiny-ar"]["infills"]
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
    steps: TextKeywords = {"steps": 8} if lm.is_diffusion else {}
    expected = [lm.generate(PROMPT, seed=seed, **(steps | {"max_new_tokens": 20, "sampler": sampler})) for seed in (5, 6)]
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
    assert chunk.usage.completion_tokens == 40
    assert not chunk.choices


def test_several_prompts_and_logprobs(openai: Any, mask: LanguageModel) -> None:
    prompts = ["First ", "Second "]
    asked = {"prompt": prompts, "max_tokens": 6, "seed": 3, "logprobs": 2, "extra_body": {"steps": 6}}
    whole = openai.completions.create(model="shakespeare-mask", **asked)
    for row, (prompt, choice) in enumerate(zip(prompts, whole.choices, strict=True)):
        assert prompt + choice.text == mask.generate(prompt, max_new_tokens=6, seed=3 + row, steps=6).text
        said = choice.logprobs
        assert "".join(said.tokens) == choice.text
        assert said.text_offset == [len("".join(said.tokens[:k])) for k in range(6)]
        for token, logprob, top in zip(said.tokens, said.token_logprobs, said.top_logprobs, strict=True):
            assert logprob <= 0
            assert len(top) == 2 + (logprob < min(top.values()) + 1e-9 and len(top) == 3)
            assert top[token] == logprob
            assert sorted(top.values())[-1] >= logprob


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
    assert whole.usage.prompt_tokens == len("To be the question")
    assert whole.usage.completion_tokens == 9


def test_a_prompt_that_looks_like_noise_is_text(served: Served) -> None:
    answer = served.post("/v1/completions", {"prompt": "a █ b", "max_tokens": 3})
    assert answer.status_code == 400
    assert "no token for '█'" in answer.json()["error"]["message"]
    begin = served.native({"model": "tiny", "prompt": "MASK", "max_tokens": 2, "steps": 2})[0][1]
    assert begin["states"] == "ggggnn"
    assert begin["mask_id"] not in [token for token, _ in begin["tokens"][:4]]


# --- streaming ---------------------------------------------------------------------------------------------------


def test_diffusing_chunks_hold_the_whole_text(served: Served) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 16, "seed": 4, "steps": 6}
    whole = served.post("/v1/completions", asked).json()["choices"][0]["text"]
    chunks = served.chunks("/v1/completions", asked | {"diffusing": True})
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert texts[-1] == whole
    assert all(len(text) == 16 for text in texts)
    counts = [text.count("█") for text in texts]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0 == counts[-1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("model", ["shakespeare-mask", "tiny-uniform", "tiny-ar"])
def test_what_is_streamed_is_never_taken_back(served: Served, model: str) -> None:
    asked = {"model": model, "prompt": "a", "max_tokens": 40, "seed": 4} | ({"steps": 12} if model != "tiny-ar" else {})
    whole = served.post("/v1/completions", asked).json()["choices"][0]["text"]
    deltas = [chunk["choices"][0]["text"] for chunk in served.chunks("/v1/completions", asked)]
    assert "".join(deltas) == whole
    assert len(whole) == 40
    assert len([delta for delta in deltas if delta]) > (0 if model == "tiny-uniform" else 1)


@pytest.mark.parametrize("model", ["shakespeare-mask", "tiny-ar"])
def test_a_stop_string_is_never_begun(served: Served, model: str) -> None:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 24, "seed": 4} | ({"steps": 24} if model != "tiny-ar" else {})
    whole = served.post("/v1/completions", asked).json()
    text = whole["choices"][0]["text"]
    stop = text[10:13]
    expected = text[: text.index(stop)]
    cut = served.post("/v1/completions", asked | {"stop": [stop, "never there"]}).json()
    assert cut["choices"][0]["text"] == expected
    assert cut["choices"][0]["finish_reason"] == "stop"
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
    expected = models[2].generate("be\nhello\n:", max_new_tokens=12, temperature=0.0).text  # as nothing says how it is drawn
    text = whole.choices[0].message.content
    assert expected.endswith(text)
    assert len(text) == 12
    assert whole.choices[0].message.role == "assistant"
    said = whole.choices[0].logprobs.content
    assert "".join(one.token for one in said) == text
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in said)
    chunks = list(openai.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    shown = [
        chunk.choices[0].delta.content
        for chunk in openai.chat.completions.create(**asked | {"extra_body": extra | {"diffusing": True}}, stream=True)
    ]
    assert shown[-1] == text
    assert all(one is not None for one in shown)


def test_an_end_token_ends_the_text(served: Served, models: list[LanguageModel]) -> None:
    lm = models[2]
    asked = {"model": "tiny-ar", "prompt": "a", "max_tokens": 60, "seed": 3}
    text = served.post("/v1/completions", asked).json()["choices"][0]["text"]
    lm.defaults["eos_token_id"] = lm.tokenizer.encode(text[30])
    try:
        answer = served.post("/v1/completions", asked | {"temperature": 1.0, "sampler": "lookup:2"}).json()
        expected = text[: text.index(text[30])]
        assert answer["choices"][0]["text"] == expected
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == len(expected)
        told = served.native(asked | {"sampler": "lookup:3"})
        assert told[-1][1]["text"] == "a" + expected
        assert told[-1][1]["finish_reason"] == "stop"
    finally:
        del lm.defaults["eos_token_id"]


def test_chat_needs_a_template(served: Served) -> None:
    answer = served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]


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
    assert (first, last) == ("begin", "end")
    assert {name for name, _ in told[1:-1]} == {"step"}
    state, texts, ids = list(begin["states"]), [text for _, text in begin["tokens"]], [token for token, _ in begin["tokens"]]
    assert begin["states"] == "g" * 8 + "n" * 20
    assert "".join(texts[:8]) == prompt
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
                assert 0 <= confidence <= 1
                assert len(others) == 2
                assert others[0][1] >= others[1][1]
                assert confidence <= others[0][1] + 1e-4
    assert set(state[8:]) <= {"f", "c"}
    assert "".join(texts) == end["text"] == expected.text
    assert end["usage"]["forwards"] == told[-2][1]["forwards"] == expected.forwards
    assert end["usage"]["completion_tokens"] == expected.tokens == 20
    assert end["finish_reason"] == "length"
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
    assert len(text) == 19
    assert text.endswith("end")
    assert all(text[i] == first[i] for i in range(16) if i not in holes)
    assert told[-1][1]["usage"]["prompt_tokens"] == 15
    assert told[0][1]["states"].count("n") == 4


def test_rejected_draft_tokens_are_struck(served: Served) -> None:
    told = served.native({"model": "tiny-ar", "prompt": "ababab", "max_tokens": 25, "seed": 1, "sampler": "lookup:4"})
    marks = [letter for name, step in told if name == "step" for *_, letter, _, _ in step["changed"]]
    assert marks.count("d") > 5
    assert marks.count("x") > 5
    assert marks.count("f") == 25


def test_lossless_is_the_law_in_fewer_calls(served: Served, models: list[LanguageModel]) -> None:
    asked = {"model": "tiny-ar", "prompt": "ab" * 5, "max_tokens": 20, "seed": 1, "temperature": 0.0}
    plain, fast = (served.post("/v1/completions", asked | more).json() for more in ({}, {"lossless": True}))
    assert plain["choices"] == fast["choices"]
    assert fast["usage"]["forwards"] < plain["usage"]["forwards"] == 20
    assert fast["dlm"]["sampler"] == "lookup:auto"
    rounded = served.post("/v1/completions", asked | {"sampler": "draft:int8,5"}).json()
    assert plain["choices"] == rounded["choices"]
    assert rounded["usage"]["forwards"] < 10
    assert served.post("/v1/completions", {"prompt": "a", "max_tokens": 4, "lossless": True}).json()["dlm"]["sampler"] == "speculative"
    refused = served.post("/v1/completions", {"prompt": "a", "lossless": True, "sampler": "confidence"})
    assert refused.status_code == 400
    assert "approximates" in refused.json()["error"]["message"]


# --- curl --------------------------------------------------------------------------------------------------------


def test_curl(served: Served) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 8, "steps": 4, "seed": 1}
    status, text = curl(f"{served.url}/v1/completions", body=json.dumps(asked).encode())
    whole = json.loads(text)
    assert status == 200
    assert len(whole["choices"][0]["text"]) == 8
    assert whole["object"] == "text_completion"
    status, text = curl(f"{served.url}/v1/completions", "-N", body=json.dumps(asked | {"stream": True}).encode())
    *chunks, (_, done) = events(text, parse=False)
    assert status == 200
    assert done == "[DONE]"
    assert "".join(json.loads(data)["choices"][0]["text"] for _, data in chunks) == whole["choices"][0]["text"]
