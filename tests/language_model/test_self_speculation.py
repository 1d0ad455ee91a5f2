"""Self-speculation of Nemotron-Labs-Diffusion: the block that it denoises drafts, its causal reading verifies.

Shapes: L positions of a text, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import Dlm
from dlm.errors import InputError
from dlm.language_model import load
from dlm.models.pattern import reading
from dlm.sampling.autoregressive.drafters import BlockDrafter
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.draw import generators
from goldens import GOLDEN, canvas, model, rows

FAMILY = "nemotron_labs_diffusion"
WORDS = ("block", "block:4", "block:2", "block:auto", "block:4:0.05", "lookup:4", "lossless")


def greedy(prompt: list[int], new: int) -> list[int]:
    """The likeliest next token, one at a time, by the causal reading, whose logits a golden file has."""
    lm, text = model(FAMILY), list(prompt)
    for _ in range(new):
        logits_V = reading(lm.network, "causal")(torch.tensor([text]))[0, -1]
        logits_V[lm.tokenizer.mask_id] = -torch.inf
        text.append(int(logits_V.argmax()))
    return text


def test_plain_decoding_is_the_causal_reading() -> None:
    prompt = rows(FAMILY)[0]
    (found,) = model(FAMILY).generate([prompt], sampler="autoregressive", temperature=0.0, max_new_tokens=12)
    ids, expected = found.trajectory.current_BT[0].tolist(), greedy(prompt, 12)
    ended = [i for i, token in enumerate(expected) if token in model(FAMILY).stops and i >= len(prompt)]
    assert ids[: ended[0] + 1 if ended else None] == expected[: ended[0] + 1 if ended else None]
    assert found.sampler == "autoregressive"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("word", WORDS)
def test_the_text_is_that_of_plain_decoding(word: str, temperature: float) -> None:
    options: Any = {"temperature": temperature, "max_new_tokens": 20, "seed": 3}
    plain = model(FAMILY).generate(rows(FAMILY), sampler="autoregressive", **options)
    found = model(FAMILY).generate(rows(FAMILY), sampler=word, **options)
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.trajectory.current_BT[one.row], other.trajectory.current_BT[other.row])
    measured = word in ("lossless", "block:auto", "lookup:4")  # how many draft tokens pay is measured, or the text has no repetition
    assert measured or sum(one.proposed or 0 for one in found) > 0


def test_draft_tokens_are_those_of_a_block_that_is_read_fully_after_a_causal_text() -> None:
    lm, checked = model(FAMILY), 0
    made = lm.sampler(sampler="block:4", temperature=0.0)
    assert isinstance(made, SpeculativeDecoder)
    for frame in made.steps(canvas(FAMILY, rows(FAMILY)[:2]), rng=generators(0, 2)):
        assert frame.draft_BT is not None
        for row in range(2):
            drafted = [i for i in frame.draft_BT[row].tolist() if i >= 0]
            known = len(rows(FAMILY)[row]) + 16 - int((~frame.settled_BT[row]).sum())
            if not drafted:
                continue
            text_1L = torch.tensor([[*frame.tokens_BT[row, :known].tolist(), *[lm.tokenizer.mask_id] * len(drafted)]])
            logits_LV = lm.network(text_1L, begin_B1=torch.tensor([[known - 1]]))[0, known:]
            logits_LV[:, lm.tokenizer.mask_id] = -torch.inf
            assert drafted == logits_LV.argmax(-1).tolist()
            checked += len(drafted)
    assert checked > 20


def test_accepted_tokens_save_forward_passes() -> None:
    """A network whose next token is the same whatever it reads accepts every draft, and both kinds of pass count."""
    lm = load(str(GOLDEN / FAMILY))
    with torch.no_grad():
        lm.network.embed.weight[:] = lm.network.embed.weight[3]
    lm.defaults["eos_token_id"] = []
    (found,) = lm.generate([rows(FAMILY)[0]], sampler="block:4", temperature=0.0, max_new_tokens=17)
    assert found.proposed == found.accepted
    assert len(set(found.trajectory.current_BT[0, 9:].tolist())) == 1
    assert found.tokens == 17
    assert found.forwards == 1 + 4 * 2  # one token, then four times a block of a draft and its verification


def test_a_block_is_no_longer_than_that_of_the_training() -> None:
    lm = model(FAMILY)
    most = lm.config.network.block_length
    made = lm.sampler(sampler="block:200")
    assert isinstance(made, SpeculativeDecoder)
    assert isinstance(made.drafter, BlockDrafter)
    assert made.stride == most
    assert "block" in [info.name for info in lm.samplers]
    assert "block" in lm.exact_samplers


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sdar", {"sampler": "block:4"}, "needs an autoregressive model"),
        (FAMILY, {"sampler": "block:4", "steps": 8}, "leave --steps away"),
        (FAMILY, {"sampler": "block:4", "guidance": 2.0}, "needs a diffusion model"),
        (FAMILY, {"draft": "block", "sampler": "topk"}, "chooses the sampler"),
        ("shakespeare-ar", {"sampler": "block:4"}, "denoises no block"),
    ],
)
def test_options_that_do_not_go_with_it(family: str, options: Any, message: str) -> None:
    lm = load(family) if family.startswith("shakespeare") else model(family)
    with pytest.raises(InputError, match=message):
        lm.sampler(**options)


def test_the_command_line(dlm: Dlm) -> None:
    texts = []
    for word in ("autoregressive", "block:4"):
        code, out, _ = dlm("generate", "7 30 41", str(GOLDEN / FAMILY), "--max-new-tokens", "8", "--sampler", word, "--temperature", "0")
        assert code == 0
        texts.append(out)
    assert texts[0] == texts[1]
