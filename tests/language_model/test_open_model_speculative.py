"""Any-order speculative decoding of models of other projects: the text of one token a forward pass in the same order, in fewer passes.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion.any_order_speculative import AnyOrderSpeculativeSampler
from dlm.sampling.diffusion.constraints import AllowedTokens
from dlm.sampling.diffusion.protocols import Constraint
from dlm.sampling.draw import generators, uniform
from dlm.trajectory import Canvas, Frame
from goldens import BIDIRECTIONAL, canvas, model, rows

ALL = [*BIDIRECTIONAL, "sdar"]


def sampler(family: str, word: str = "speculative:8", **options: Any) -> AnyOrderSpeculativeSampler:
    made = model(family).sampler(**{"sampler": word, "temperature": 0.0, **options})
    assert isinstance(made, AnyOrderSpeculativeSampler)
    return replace(made, stops=frozenset())


def run(made: AnyOrderSpeculativeSampler, text: Canvas, seed: int = 0) -> list[Frame]:
    return list(made.steps(text, rng=generators(seed, len(text.tokens_BT))))


def one_by_one(family: str, prompt: list[int], length: int, block: int, allowed_V: Tensor | None = None) -> list[int]:
    """The likeliest token at each position, in the order that seed 0 draws, within blocks; by the reference's own logits."""
    lm = model(family)
    assert isinstance(lm.noise, MaskedNoise)
    z_T = torch.tensor([*prompt, *[lm.tokenizer.mask_id] * length])
    order = uniform(generators(0, 1), len(z_T))[0].argsort().tolist()
    if block:
        order.sort(key=lambda i: i // block)
    for at in (i for i in order if i >= len(prompt)):
        logits_TV = lm.logits(z_T[None])[0]
        logits_V = logits_TV[max(0, at - 1) if lm.config.shift else at].clone()
        logits_V[lm.noise.tokens :] = -torch.inf
        logits_V[lm.tokenizer.mask_id] = -torch.inf
        if allowed_V is not None:
            logits_V[~allowed_V] = -torch.inf
        z_T[at] = logits_V.argmax()
    return [int(i) for i in z_T]


@pytest.mark.parametrize("family", ALL)
def test_the_likeliest_tokens_one_by_one(family: str) -> None:
    prompt = rows(family)[0]
    block = 4 if family == "sdar" else 0
    found = run(sampler(family, block_length=block or None), canvas(family, [prompt]))
    assert found[-1].tokens_BT[0].tolist() == one_by_one(family, prompt, 16, block)
    assert len(found) <= 16


def test_allowed_tokens_one_by_one() -> None:
    lm, prompt = model("llada"), rows("llada")[0]
    allowed_V = torch.zeros(lm.config.network.vocab_size, dtype=torch.bool)
    allowed_V[97:110] = True
    made = replace(sampler("llada"), constraint=AllowedTokens(allowed_V, len(allowed_V), lm.tokenizer.mask_id))
    *_, found = run(made, canvas("llada", [prompt]))
    assert found.tokens_BT[0].tolist() == one_by_one("llada", prompt, 16, 0, allowed_V)


OPTIONS: list[dict[str, Any]] = [{}, {"block_length": 8}, {"guidance": 1.7}, {"allow": "abcdefgh "}, {"top_k": 3}]
CASES = [
    (f, o) for f in [*ALL, "nemotron_labs_diffusion", "mdlm", "bd3lm"] for o in OPTIONS if not {"allow", "guidance"} & o.keys() or f in ALL
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_fewer_passes_than_tokens_and_each_row_as_alone(family: str, options: dict[str, Any]) -> None:
    """With draft tokens of one a pass, or of eight, the likeliest tokens are the same; rows of other lengths do not matter."""
    prompts = rows(family)
    made, plain = (sampler(family, f"speculative:{count}", **options) for count in (8, 1))
    found = run(made, canvas(family, prompts))
    assert torch.equal(found[-1].tokens_BT, run(plain, canvas(family, prompts))[-1].tokens_BT)
    for row, prompt in enumerate(prompts):
        alone = run(made, canvas(family, [prompt]), row)
        assert alone[-1].tokens_BT[0].tolist() == found[-1].tokens_BT[row, : len(prompt) + 16].tolist()


def test_a_pattern_holds_and_a_template_is_filled() -> None:
    lm = model("llada")
    generation = lm.generate("ab", pattern="ab[a-z]+ [a-z]+", sampler="speculative:4", temperature=1.0, max_new_tokens=8, seed=2)
    head, _, tail = generation.text.partition(" ")
    assert head.startswith("ab")
    assert head.isalpha()
    assert tail.isalpha()
    filled = lm.generate(template="the __ of _ an", sampler="speculative:4", temperature=1.0)
    assert filled.tokens == 3


class Marginal:
    """A network whose logits do not depend on the text: any order gives its own distribution at every position."""

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, /, *, at_BQ: Tensor | None = None, **how: Any) -> Tensor:
        return torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0]).expand(*z_BQ.shape, 5).clone()


@pytest.mark.parametrize("constraint", [None, AllowedTokens([0, 1, 2], 5, 4)], ids=str)
def test_the_distribution_of_draws(constraint: Constraint | None) -> None:
    noise = MaskedNoise(5, 4)
    made = AnyOrderSpeculativeSampler(
        Marginal(), noise, 8, 3, fills_window=False, block_length=2, sees_ahead=True, constraint=constraint, block_phase="prompt"
    )
    text = Canvas.from_rows([[1, *[None] * 5]] * 600, fill=4)
    *_, last = made.steps(text, rng=generators(0, 600))
    p_V = torch.tensor([0.0, 1.0, -1.0, 0.5]).softmax(-1) if constraint is None else torch.tensor([0.0, 1.0, -1.0]).softmax(-1)
    found_V = torch.bincount(last.tokens_BT[:, 1:].flatten(), minlength=len(p_V)) / 3000
    assert (found_V - p_V).abs().max() < 4 * (0.25 / 3000) ** 0.5


def test_a_text_ends_with_its_stop() -> None:
    lm, prompt = model("llada"), rows("llada")[0]
    made = sampler("llada", block_length=4)
    whole = run(made, canvas("llada", [prompt]))[-1]
    stop = int(whole.tokens_BT[0, len(prompt) + 1])
    found = run(replace(made, stops=frozenset({stop})), canvas("llada", [prompt]))[-1]
    end = whole.tokens_BT[0].tolist().index(stop, len(prompt))
    assert found.tokens_BT[0, : end + 1].tolist() == whole.tokens_BT[0, : end + 1].tolist()
    assert found.forwards < whole.forwards
    assert found.tokens_BT[0, len(prompt) + 8 :].tolist() == [lm.tokenizer.mask_id] * 8
