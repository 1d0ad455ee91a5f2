"""Answers that do not depend on their neighbours: a row alone, in a batch and padded on either side is one and the same.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.formats.native import ModelConfig
from dlm.language_model import LanguageModel
from dlm.language_model.options import TextKeywords
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.noise import loss
from dlm.noise.masked import MaskedNoise
from dlm.noise.uniform import UniformNoise
from dlm.sampling import registry
from dlm.text.tokenizer import Tokenizer

WINDOW = 16
ALPHABET = "\n !abcdefghijklmnopqrstuvwxyz[]MASK█_"
TOKENIZER = Tokenizer.characters(ALPHABET)
VOCAB, MASK = TOKENIZER.vocab_size + 1, TOKENIZER.mask_id
PATTERNS: dict[str, dict[str, Any]] = {
    "full": {"attention": "full"},
    "causal": {"attention": "causal"},
    "block_causal": {"attention": "block_causal", "block_length": 4},
    "full convolution": {"attention": "full", "conv": 5},
    "causal convolution": {"attention": "causal", "conv": 4},
}


def network(std: float = 0.1, **changes: Any) -> Transformer:
    """Random weights everywhere, the residual outputs that begin at zero included."""
    sizes = {"vocab_size": VOCAB, "window": WINDOW, "layers": 2, "heads": 4, "kv_heads": 2, "width": 32}
    made, rng = Transformer(TransformerConfig(**(sizes | changes))), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, std, generator=rng)
        made.head.weight *= 0.5 / std  # logits of order 1, so that an atol of 1e-5 says something
    return made.eval().requires_grad_(False)


def texts(*lengths: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=rng) for length in lengths]


def padded(rows: list[Tensor], side: str, garbage: int, width: int = 0) -> tuple[Tensor, Tensor]:
    """(z_BT, valid_BT); what stands in the padding is drawn with the seed `garbage`."""
    width = width or max(map(len, rows))
    z_BT = torch.randint(VOCAB, (len(rows), width), generator=torch.Generator().manual_seed(garbage))
    valid_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        z_BT[b, place], valid_BT[b, place] = row, True
    return z_BT, valid_BT


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_of_a_row_alone_in_a_batch_and_padded_on_either_side(pattern: str, time: bool) -> None:
    made, rows = network(time_conditioning=time, **PATTERNS[pattern]), texts(16, 11, 1, 7, 12)
    t_B = torch.linspace(0.1, 0.9, len(rows))
    alone = [made(row[None], t_B[b : b + 1])[0] for b, row in enumerate(rows)]
    assert float(torch.cat(alone).std()) > 0.1
    for side in ("left", "right"):
        for width in (16, 23):
            z_BT, valid_BT = padded(rows, side, 0, width)
            logits_BTV = made(z_BT, t_B, valid_BT=valid_BT)
            assert logits_BTV.isfinite().all()
            for b, expected in enumerate(alone):
                assert torch.allclose(logits_BTV[b, valid_BT[b]], expected, atol=1e-5), (side, width, b)
    full = texts(16, 16, 16)
    together = made(torch.stack(full), t_B[:3])
    for b, row in enumerate(full):
        assert torch.allclose(together[b], made(row[None], t_B[b : b + 1])[0], atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_stands_in_the_padding_changes_no_bit(pattern: str, side: str) -> None:
    made, rows = network(**PATTERNS[pattern]), texts(16, 11, 1, 7)
    outs = []
    for garbage in (0, 1):
        z_BT, valid_BT = padded(rows, side, garbage)
        outs.append(made(z_BT, valid_BT=valid_BT)[valid_BT])
    assert not torch.equal(padded(rows, side, 0)[0], padded(rows, side, 1)[0])
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_neighbour_changes_no_bit(pattern: str) -> None:
    made = network(**PATTERNS[pattern])
    first, second, third = texts(16, 16, 16)
    assert torch.equal(made(torch.stack([first, second]))[0], made(torch.stack([first, third]))[0])


def test_padding_that_says_nothing_changes_nothing() -> None:
    for pattern in PATTERNS.values():
        made, z_BT = network(**pattern), torch.stack(texts(16, 16))
        everything = torch.ones(2, 16, dtype=torch.bool)
        assert torch.allclose(made(z_BT), made(z_BT, valid_BT=everything), atol=1e-6)


@dataclass(frozen=True)
class Fixed(MaskedNoise):
    """Noise that masks what it is told to, so that a row meets the same masks alone and in a batch."""

    masked_BT: Tensor = field(default_factory=lambda: torch.zeros(0))

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        return torch.where(self.masked_BT, self.mask_id, x_BT)

    def corrupt_count(self, x_BT: Tensor, count_B: Tensor, free_BT: Tensor, rng: torch.Generator) -> Tensor:
        assert torch.equal(count_B, (self.masked_BT & free_BT).sum(-1))
        return torch.where(self.masked_BT & free_BT, self.mask_id, x_BT)


def assert_own(nats: Callable[[slice, int], Tensor], lengths: list[int]) -> None:
    """nats(rows, width): each row costs alone, at its own length, what it costs in the batch."""
    together = nats(slice(0, len(lengths)), max(lengths))
    assert together.shape == (len(lengths),)
    assert (together > 1).all()
    for b, length in enumerate(lengths):
        assert torch.allclose(nats(slice(b, b + 1), length), together[b : b + 1], rtol=1e-5), b


@pytest.mark.parametrize("estimator", ["continuous", "discrete", "any_order", "autoregressive"])
def test_the_loss_of_a_row_is_its_own(estimator: str) -> None:
    """Alone, in a batch, and padded: what is not free is given, and the network that is asked knows the padding."""
    made = network(time_conditioning=True, attention="causal" if estimator == "autoregressive" else "full")
    rows = [row % (VOCAB - 1) for row in texts(16, 9, 13)]
    x_BT, valid_BT = padded(rows, "right", 0)
    x_BT = x_BT % (VOCAB - 1)
    draws = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    free_BT = valid_BT & (torch.arange(16) > 1)
    masked_BT = (draws < 0.6) & free_BT
    t_B = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    if estimator == "any_order":  # the level that asks for as many masks as there are
        t_B = (masked_BT.sum(-1) - 0.5) / free_BT.sum(-1)

    def nats(rows: slice, width: int) -> Tensor:
        valid, x, free = valid_BT[rows, :width], x_BT[rows, :width], free_BT[rows, :width]
        noise = Fixed(VOCAB, MASK, masked_BT=masked_BT[rows, :width])
        rng = torch.Generator().manual_seed(0)

        def predict(z_BT: Tensor, t_B: Tensor) -> Tensor:
            logits: Tensor = made(z_BT, t_B, valid_BT=valid)
            return logits

        if estimator == "autoregressive":
            return loss.autoregressive(noise, predict, x, free)
        if estimator == "discrete":
            return loss.discrete(noise, predict, x, free, rng, 10, t_B[rows])
        bound = loss.continuous if estimator == "continuous" else loss.any_order
        return bound(noise, predict, x, free, rng, t_B[rows])

    assert_own(nats, [len(row) for row in rows])


@dataclass(frozen=True)
class FixedUniform(UniformNoise):
    """The same for noise that replaces tokens."""

    z_BT: Tensor = field(default_factory=lambda: torch.zeros(0))

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        return self.z_BT

    def corrupt_count(self, x_BT: Tensor, count_B: Tensor, free_BT: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return torch.where(free_BT, self.z_BT, x_BT), count_B / 20 + 0.1, torch.ones(len(x_BT))


@pytest.mark.parametrize("estimator", ["continuous", "discrete", "counted"])
def test_the_loss_of_a_row_under_replacement_noise_is_its_own(estimator: str) -> None:
    made, rows = network(time_conditioning=True), [row % (VOCAB - 1) for row in texts(16, 9, 13)]
    x_BT, valid_BT = padded(rows, "right", 0)
    x_BT, free_BT = x_BT % (VOCAB - 1), valid_BT & (torch.arange(16) > 1)
    z_BT = torch.randint(VOCAB - 1, (3, 16), generator=torch.Generator().manual_seed(3))
    u_B = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)

    def nats(rows: slice, width: int) -> Tensor:
        valid, x, free = valid_BT[rows, :width], x_BT[rows, :width], free_BT[rows, :width]
        noise, rng = FixedUniform(VOCAB, MASK, z_BT=z_BT[rows, :width]), torch.Generator().manual_seed(0)

        def predict(z_BT: Tensor, t_B: Tensor) -> Tensor:
            assert torch.equal(z_BT[~free], x[~free])
            logits: Tensor = made(z_BT, t_B, valid_BT=valid)
            return logits

        if estimator == "discrete":
            return loss.discrete(noise, predict, x, free, rng, 10, u_B[rows])
        return {"continuous": loss.continuous, "counted": loss.counted}[estimator](noise, predict, x, free, rng, u_B[rows])

    assert_own(nats, [len(row) for row in rows])


NOISES: dict[str, dict[str, Any]] = {
    "masked": {"process": "masked"},
    "uniform": {"process": "uniform"},
    "hybrid": {"process": "hybrid", "share": 0.3},
    "semantic": {"process": "semantic", "clusters": [*(token % 6 for token in range(VOCAB - 1)), 6]},
}


def model(kind: str = "masked", context: int = 5, **changes: Any) -> LanguageModel:
    """kind: a noise, or `autoregressive`."""
    attention = {"attention": "causal" if kind == "autoregressive" else "full"}
    made = network(0.4, **(attention | changes)).double()  # in float32 the shape of a product decides between probabilities near 1
    with torch.no_grad():
        made.head.weight *= 2  # a network with opinions: the text depends on what is read
    noise, objective = NOISES.get(kind, NOISES["masked"]), kind if kind == "autoregressive" else "diffusion"
    config = ModelConfig(made.config, MASK, objective=objective, noise=noise, context=context)
    return LanguageModel(made, config, TOKENIZER, name="tiny")


PROMPTS = ["", "a", "the fox", "a prompt longer than a window", "!"]
SAMPLERS: list[tuple[str, dict[str, Any]]] = [
    ("masked", {"sampler": "ancestral", "steps": 6}),
    ("masked", {"sampler": "ancestral", "steps": 40}),
    ("masked", {"sampler": "topk", "steps": 6}),
    ("masked", {"sampler": "confidence:0.2", "steps": 6}),
    ("masked", {"sampler": "ancestral", "steps": 6, "top_k": 5, "top_p": 0.9}),
    ("masked", {"sampler": "predictor-corrector:0.5", "steps": 6}),
    ("uniform", {"sampler": "ancestral", "steps": 6}),
    ("uniform", {"sampler": "worst:3", "steps": 6, "greedy_tail": 2}),
    ("uniform", {"sampler": "refine", "steps": 20, "until_settled": 1}),
    ("hybrid", {"sampler": "predictor-corrector", "steps": 6, "top_p": 0.9}),
    ("hybrid", {"sampler": "worst", "steps": 6}),
    ("semantic", {"sampler": "entropy-bound:2", "steps": 6}),
    ("masked", {"sampler": "speculative:3"}),
    ("masked", {"sampler": "klass:0.2", "steps": 6, "cache": "dual", "block_length": 4}),
    ("masked", {"sampler": "remdm-conf:0.5", "steps": 8}),
    ("masked", {"sampler": "revoke:0.3", "steps": 8}),
    ("masked", {"sampler": "ancestral", "steps": 6, "guidance": 2.0}),
    ("masked", {"sampler": "topk", "steps": 6, "allow": "abc "}),
    ("autoregressive", {}),
    ("autoregressive", {"cache": False, "top_p": 0.8}),
]


@pytest.mark.parametrize(("kind", "options"), SAMPLERS, ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x)
@pytest.mark.parametrize("layout", [{"max_new_tokens": 21}, {"length": 37}])
def test_a_prompt_is_answered_the_same_alone_and_among_others(kind: str, options: TextKeywords, layout: TextKeywords) -> None:
    made = model(kind)
    asked: TextKeywords = {"temperature": 1.0} | layout | options
    together = made.generate(PROMPTS, seed=11, **asked)
    alone = [made.generate(prompt, seed=11 + i, **asked) for i, prompt in enumerate(PROMPTS)]
    assert [g.text for g in together] == [g.text for g in alone]
    assert [(g.seed, g.tokens) for g in together] == [(g.seed, g.tokens) for g in alone]
    assert [g.steps_saved for g in together] == [g.steps_saved for g in alone]
    assert [g.expected_edits for g in together] == pytest.approx([g.expected_edits for g in alone])
    fewer = made.generate(PROMPTS[2:], seed=13, **asked)
    assert [g.text for g in fewer] == [g.text for g in together[2:]]
    assert all(g.text.startswith(prompt) for prompt, g in zip(PROMPTS, together, strict=True))
    assert len({g.text for g in made.generate([""] * 4, seed=0, **(options | {"max_new_tokens": 24}))}) == 4  # rows are not copies


@pytest.mark.parametrize("attention", ["full", "block_causal", "causal"])
def test_a_diffuser_of_any_pattern_answers_the_same(attention: str) -> None:
    made = model("masked", context=4, **PATTERNS[attention])
    together = made.generate(PROMPTS, seed=2, max_new_tokens=18, steps=5)
    assert [g.text for g in together] == [made.generate(p, seed=2 + i, max_new_tokens=18, steps=5).text for i, p in enumerate(PROMPTS)]


def test_the_answer_depends_on_the_prompt_and_on_the_suffix() -> None:
    """Otherwise the tests above would pass for a network that reads nothing."""
    made = model()
    answers = {made.generate(prompt, seed=0, max_new_tokens=10, steps=10).text[len(prompt) :] for prompt in ("abc", "xyz", "!!!")}
    assert len(answers) == 3
    ends = {made.generate("ab", seed=0, max_new_tokens=8, steps=8, suffix=suffix).text[2:10] for suffix in ("zzz", "aaa", "!!!")}
    assert len(ends) == 3


@pytest.mark.parametrize("kind", ["masked", "uniform", "hybrid", "autoregressive"])
@pytest.mark.parametrize("prompt", ["[MASK]", "█", "██ a █", "_", "a[MASK]█"])
def test_a_prompt_that_looks_like_a_mask_is_text(kind: str, prompt: str) -> None:
    made = model(kind)
    canvas = made.canvas(prompt, max_new_tokens=6)
    assert canvas.tokens_BT[0, : len(prompt)].tolist() == TOKENIZER.encode(prompt)
    assert (canvas.tokens_BT[0, : len(prompt)] != MASK).all()
    assert canvas.free_BT[0].tolist() == [False] * len(prompt) + [True] * 6
    generation = made.generate(prompt, max_new_tokens=6, seed=1)
    assert generation.text.startswith(prompt)
    assert len(generation.text) == len(prompt) + 6
    for frame in generation.trajectory.frames():
        assert torch.equal(frame.tokens_BT[0, : len(prompt)], canvas.tokens_BT[0, : len(prompt)])
    assert generation.trajectory.text() == generation.text


def test_a_mask_character_in_a_template_is_text_and_an_underscore_is_a_hole() -> None:
    made = model()
    canvas = made.canvas(template="█a_[MASK]\\__")
    assert canvas.free_BT[0].tolist() == [False, False, True, *[False] * 7, True]
    text = made.generate(template="█a_[MASK]\\__", seed=0).text
    assert text[:2] == "█a"
    assert text[3:10] == "[MASK]_"
    assert len(text) == 11


@pytest.mark.slow
def test_generated_text_never_holds_the_mask_id() -> None:
    """The mask has the highest logit of all and still is no text."""
    for kind in (*NOISES, "autoregressive"):
        made = model(kind)
        made.network.head.weight[MASK] = 10 * made.network.head.weight.abs().max()
        words = (None,) if kind == "autoregressive" else [one.name for one in registry.known(registry.kind(made.noise)) if one.rule]
        for sampler in words:
            generation = made.generate(["", "abc"], max_new_tokens=30, seed=0, sampler=sampler)
            assert all((g.trajectory.current_BT[g.row] != MASK)[g.trajectory.valid_BT[g.row]].all() for g in generation)


@pytest.mark.parametrize("kind", ["masked", "hybrid"])
def test_stream_and_generate_are_the_same_run(kind: str) -> None:
    made = model(kind)
    frames = list(made.stream(["ab", "the fox"], seed=4, max_new_tokens=20, steps=5))
    generations = made.generate(["ab", "the fox"], seed=4, max_new_tokens=20, steps=5)
    noise = kind != "masked"  # replacement noise begins with a frame of itself, which is the start of the trajectory
    assert len(frames) - noise == generations[0].steps == len(generations[0].trajectory) - 1
    for frame, kept in zip(frames, list(generations[0].trajectory.frames())[1 - noise :], strict=True):
        assert torch.equal(frame.tokens_BT, kept.tokens_BT)
        assert torch.equal(frame.settled_BT, kept.settled_BT)
    assert made.decode(frames[-1], 1) == generations[1].text
