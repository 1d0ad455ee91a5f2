"""Log-probabilities of prompts and of tokens that look alike, as clients add them up (reports D15 and D16)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import make_model
from dlm.formats.native import ModelConfig
from dlm.language_model import LanguageModel
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer
from kinds import byte_level
from serve.conftest import named
from serve.serving import Served, serving, shape, wait

pytest.importorskip("fastapi")


def of_bytes(start: int | None = -1, *, diffusion: bool = False, window: int = 32) -> LanguageModel:
    """A model of byte-level BPE, most of whose tokens are parts of characters. start: its start token, -1 the mask, None none."""
    tokenizer = Tokenizer(byte_level())
    network = TransformerConfig(tokenizer.ids, window, 1, 2, width=32, attention="full" if diffusion else "causal")
    made = Transformer(network)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    objective = "diffusion" if diffusion else "autoregressive"
    settings = ModelConfig(network, tokenizer.mask_id, objective, {"process": "masked", "schedule": "linear"}, 8, start_token_id=start)
    lm = LanguageModel(made.eval().requires_grad_(False), settings, tokenizer)
    lm.chat = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}:")
    return lm


@pytest.fixture(scope="module")
def ar() -> LanguageModel:
    return named(make_model("autoregressive", window=32, context=8), "tiny-ar")


@pytest.fixture(scope="module")
def bpe() -> LanguageModel:
    return named(of_bytes(), "bpe")


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return named(of_bytes(None), "base")


@pytest.fixture(scope="module")
def scoring(ar: LanguageModel, bpe: LanguageModel, base: LanguageModel) -> Iterator[Served]:
    with serving([ar, bpe, base, named(make_model(), "tiny"), named(of_bytes(diffusion=True), "bpe-mask")]) as made:
        yield made


def expected(lm: LanguageModel, ids: list[int]) -> list[float | None]:
    """The log-softmax that `lm.predict` gives for each token."""
    mask_id = lm.tokenizer.mask_id
    logits_TV = lm.predict(torch.tensor([[mask_id, *ids[:-1]]]), torch.zeros(1))[0].double()
    logits_TV[:, mask_id] = -torch.inf
    found: list[float | None] = logits_TV.log_softmax(-1)[torch.arange(len(ids)), ids].tolist()
    return [None, *found[1:]] if lm.config.start_token_id is None else found


@pytest.mark.parametrize("name", ["tiny-ar", "bpe", "base"])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_d15_a_prompt_that_is_echoed_has_logprobs(
    scoring: Served, ar: LanguageModel, bpe: LanguageModel, base: LanguageModel, name: str, max_tokens: int
) -> None:
    lm, prompts = {"tiny-ar": ar, "bpe": bpe, "base": base}[name], ["ROMEO: But", "the king is"]
    asked = {"model": name, "prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "echo": True, "logprobs": 2, "n": 2}
    choices = scoring.post("/v1/completions", asked).json()["choices"]
    assert len(choices) == 4
    for index, choice in enumerate(choices):
        prompt, said = prompts[index // 2], choice["logprobs"]
        ids = lm.tokenizer.encode(prompt)
        values = expected(lm, ids)
        assert choice["text"].startswith(prompt)
        assert "".join(said["tokens"]) == choice["text"]
        assert len(said["tokens"]) == len(ids) + max_tokens
        assert said["text_offset"][0] == 0
        assert said["text_offset"] == [len("".join(said["tokens"][:k])) for k in range(len(ids) + max_tokens)]
        for value, found in zip(values, said["token_logprobs"], strict=False):
            assert value == found or (value is not None and math.isclose(value, found, abs_tol=1e-4))
        for value, top in zip(said["token_logprobs"], said["top_logprobs"], strict=True):
            assert top is None if value is None else value in top.values()
    usage = scoring.post("/v1/completions", asked).json()["usage"]
    assert usage["prompt_tokens"] == sum(len(lm.tokenizer.encode(prompt)) for prompt in prompts)
    assert usage["completion_tokens"] == 4 * max_tokens
    wait(lambda: scoring.engine.running == scoring.engine.waiting == 0)


def test_d15_a_harness_client_sums_the_likelihood_of_dlm(scoring: Served, ar: LanguageModel) -> None:
    """Requests and sums as the completions client of lm-evaluation-harness makes them, against that harness's model of this library."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from dlm.workflows.harness_model import Harness

    pairs = [("ROMEO:", " But soft"), ("the light", " breaks"), ("JULIET: O", "!"), ("a", "b")]
    encoded = [[ar.tokenizer.encode(part) for part in pair] for pair in pairs]
    prompts = [context + continuation for context, continuation in encoded]
    payload = LocalCompletionsAPI._create_payload(SimpleNamespace(model="tiny-ar"), prompts)
    answer = scoring.post("/v1/completions", payload)
    assert answer.status_code == 200, answer.text
    theirs = LocalCompletionsAPI.parse_logprobs(answer.json(), prompts, [len(context) for context, _ in encoded])
    ours = Harness(ar).loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)])
    for (their_logp, their_greedy), (logp, greedy) in zip(theirs, ours, strict=True):
        assert their_logp == pytest.approx(logp, abs=1e-4)
        assert their_greedy == greedy


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "tiny", "prompt": "a", "echo": True, "logprobs": 1}, "tiny is a diffusion model, which has a bound"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens 0 writes nothing: it goes with echo"),
    ({"prompt": "", "max_tokens": 0, "echo": True}, "there is no prompt to echo"),
    ({"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "leave stream away"),
    ({"prompt": "a" * 33, "max_tokens": 0, "echo": True, "logprobs": 1}, "1 .. 32, the window"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_d15_prompts_without_logprobs_are_refused(scoring: Served, asked: dict[str, Any], said: str) -> None:
    answer = scoring.post("/v1/completions", asked)
    assert answer.status_code == 400
    assert said in shape(answer.text)["message"]


def test_echo_alone_scores_nothing(scoring: Served) -> None:
    choice = scoring.post("/v1/completions", {"prompt": "abc", "max_tokens": 0, "echo": True}).json()["choices"][0]
    assert choice == {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length"}


@pytest.mark.parametrize("model", ["bpe", "bpe-mask"])
def test_d16_alternatives_of_a_completion_never_collapse(scoring: Served, model: str) -> None:
    asked = {"model": model, "prompt": "the king", "max_tokens": 20, "logprobs": 5, "seed": 2, "temperature": 1.0}
    choice = scoring.post("/v1/completions", asked).json()["choices"][0]
    said = choice["logprobs"]
    assert "".join(said["tokens"]) == choice["text"]
    for value, top in zip(said["token_logprobs"], said["top_logprobs"], strict=True):
        assert value in top.values()
        assert len(top) == 5
        assert not any("\ufffd" in key for key in top)
    assert any(key.startswith("bytes:\\x") for top in said["top_logprobs"] for key in top)


@pytest.mark.parametrize("model", ["bpe", "bpe-mask"])
def test_d16_bytes_of_a_chat_are_those_of_the_tokens(scoring: Served, model: str) -> None:
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "the"}],
        "max_tokens": 20,
        "logprobs": True,
        "top_logprobs": 5,
        "seed": 2,
    }
    choice = scoring.post("/v1/chat/completions", asked).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 20
    joined = bytes(byte for entry in content for byte in entry["bytes"])
    assert joined.decode("utf-8", "replace") == choice["message"]["content"]
    assert any(len(entry["bytes"]) == 1 and entry["bytes"][0] > 127 for entry in content)
    for entry in content:
        assert len({tuple(other["bytes"]) for other in entry["top_logprobs"]}) == 5
        assert [239, 191, 189] not in [other["bytes"] for other in entry["top_logprobs"]]


def test_d16_the_parts_of_a_character(scoring: Served, bpe: LanguageModel) -> None:
    ids = bpe.tokenizer.encode("天")
    assert len(ids) == 3
    asked = {"model": "bpe", "prompt": [ids], "max_tokens": 0, "echo": True, "logprobs": 1}
    choice = scoring.post("/v1/completions", asked).json()["choices"][0]
    assert choice["text"] == "天"
    assert choice["logprobs"]["tokens"] == ["", "", "天"]
    names = [f"bytes:\\x{byte:02x}" for byte in "天".encode()]
    assert all(name in top for name, top in zip(names, choice["logprobs"]["top_logprobs"], strict=True))


def test_very_unlikely_tokens_keep_their_logprobs(ar: LanguageModel) -> None:
    """Below the smallest float32 too."""
    from dlm.sampling.batching import WrittenDistribution
    from dlm.serve.engine.job import Job

    score_1V = torch.zeros(1, ar.tokenizer.ids)
    score_1V[0, 0] = 500.0
    job = Job("x", lambda: pytest.fail("nothing is made"), ar.canvas("a", length=3), 0, ar.tokenizer.mask_id, lambda _: None, records=2)
    written = WrittenDistribution(torch.zeros(1, dtype=torch.long), torch.tensor([1]), score_1V)
    ((logp, others),) = job._confidences(written, 0, torch.tensor([1]), torch.tensor([5]))
    assert logp == pytest.approx(-500)
    assert others[0] == (0, pytest.approx(0))
