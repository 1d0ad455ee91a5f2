"""SmolLM2-135M-Instruct in full.

transformers takes most of a minute to read the GGUF file, so what it read is written down here, from
`AutoModelForCausalLM.from_pretrained(directory, gguf_file=...)` and `AutoTokenizer` likewise (5.23); the network is compared with
its LlamaForCausalLM, which reads our export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dlm.errors import InputError
from dlm.formats import huggingface
from dlm.formats.pull import pull
from dlm.language_model import LanguageModel, load

pytestmark = pytest.mark.slow

CORPUS = "It's  a test -- of words,\n\n\tnaïve café; 東京 😀 don't WE'LL (x_1) = {y}!  \nlast line"
CORPUS_IDS = [
    *(1589, 506, 216, 253, 1028, 3009, 282, 1924, 28, 1116, 197, 3546, 46494, 37366, 43, 17097, 247, 126, 16736, 122, 40303, 218),
    *(1326, 982, 26587, 23, 16421, 365, 104, 79, 33, 25, 446, 1662, 105, 109, 17, 256, 198, 5113, 1761),
]
PROMPT = "The capital of France is"
GREEDY_IDS = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29]
MESSAGES = [{"role": "user", "content": "Name three primary colours."}]
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n"
)
ANSWER = "The primary colours are:\n\nRed is"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    try:
        pull("smollm2-135m")
    except InputError as error:
        pytest.skip(f"the base is not here and cannot be fetched: {error}")
    return load("smollm2-135m")


@pytest.fixture(scope="module")
def theirs(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    directory: Path = tmp_path_factory.mktemp("smollm2")
    huggingface.to_hugging_face(lm.network, lm.config, directory, files=lm.files())
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def test_the_vocabulary(lm: LanguageModel) -> None:
    assert lm.tokenizer.encode(CORPUS) == CORPUS_IDS
    assert lm.tokenizer.decode(CORPUS_IDS) == CORPUS
    # SmolLM splits digits from each other and from spaces before them, which the GGUF reader of transformers forgets
    assert [lm.tokenizer.piece(i) for i in lm.tokenizer.encode("in  2024")] == ["in", "  ", "2", "0", "2", "4"]
    assert lm.tokenizer.vocab_size == 49_152
    assert lm.network.parameters_count() == 134_515_008 + 576


def test_logits_and_greedy_text(lm: LanguageModel, theirs: Any) -> None:
    head = torch.tensor([lm.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        expected = theirs(head).logits
        ids = theirs.generate(head, max_new_tokens=14, do_sample=False)[0].tolist()
    torch.testing.assert_close(lm.network(head)[..., :-1], expected, atol=1e-3, rtol=1e-4)
    made = lm.generate(PROMPT, temperature=0.0, max_new_tokens=14)
    assert made.trajectory.current_BT[0].tolist() == ids == [*head[0].tolist(), *GREEDY_IDS]
    assert made.text == lm.tokenizer.decode(ids)


def test_chat(lm: LanguageModel, theirs: Any) -> None:
    assert lm.chat_prompt(MESSAGES) == CHAT
    canvas = lm.chat_canvas(MESSAGES, max_new_tokens=9)
    given = canvas.tokens_BT[canvas.given_BT]
    assert lm.tokenizer.decode(given.tolist()) == CHAT
    expected = theirs.generate(given[None], max_new_tokens=9, do_sample=False)[0].tolist()
    *_, frame = lm.stream(canvas=canvas, temperature=0.0)
    assert frame.tokens_BT[0].tolist() == expected
    assert lm.tokenizer.decode(expected[len(given) :]) == ANSWER


def test_an_answer_ends_by_itself(lm: LanguageModel) -> None:
    canvas = lm.chat_canvas([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=40)
    frames = list(lm.stream(canvas=canvas, temperature=0.0))
    answer = [i for i in frames[-1].tokens_BT[0, canvas.given_BT[0].sum() :].tolist() if i != lm.tokenizer.mask_id]
    assert answer[-1] in lm.stops
    assert len(answer) == len(frames) < 40
    assert "Paris" in lm.tokenizer.decode(answer)
