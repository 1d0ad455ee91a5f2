"""The baseline draws its network's distribution exactly, with or without a cache, alone or in a batch.

Shapes: B rows, Q inputs of one call, L positions of the canvas, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import make_model
from dlm.errors import InputError
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.noise import loss
from dlm.noise.masked import MaskedNoise
from dlm.sampling.autoregressive.plain import AutoregressiveSampler
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame
from oracle import BayesDenoiser, Tiny, chi_square_p, total_variation

MASK, WINDOW = 9, 12


class CausalOracle:
    """The exact next-token distribution of a Tiny: reads MASK, then the text so far."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny, self.bayes, self.calls = tiny, BayesDenoiser(tiny), 0

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, *, cache: object = None, **_: object) -> Tensor:
        self.calls += 1
        tiny, read = self.tiny, z_BQ.shape[1] - 1
        assert (z_BQ[:, 0] == tiny.mask_id).all()
        assert (z_BQ[:, 1:] < tiny.vocab).all()
        assert cache is None
        text_BT = torch.full((len(z_BQ), tiny.length), tiny.mask_id)
        text_BT[:, :read] = z_BQ[:, 1:]
        logits_BTV = self.bayes(text_BT)
        logits_BTV[..., tiny.mask_id] = 5.0  # a network may well like the mask; it is not text
        return logits_BTV[:, : read + 1]


def canvas_of(rows: list[list[int]], new: int, fill: int = MASK) -> Canvas:
    return Canvas.from_rows([[*row, *[None] * new] for row in rows], fill=fill)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_draws_the_exact_distribution(seed: int) -> None:
    tiny, rows = Tiny(3, 3, seed=seed), 5000
    oracle = CausalOracle(tiny)
    sampler = AutoregressiveSampler(oracle, tiny.mask_id, tiny.length)
    hole_BT = torch.ones(rows, 3, dtype=torch.bool)
    frames = list(sampler.steps(Canvas(torch.zeros(rows, 3, dtype=torch.long), hole_BT, hole_BT), rng=generators(0, rows)))
    assert len(frames) == oracle.calls == 3
    assert frames[-1].settled_BT.all()
    assert chi_square_p(frames[-1].tokens_BT, tiny.p_S, tiny) > 1e-3
    assert total_variation(frames[-1].tokens_BT, tiny) < 0.04
    assert chi_square_p(frames[-1].tokens_BT, Tiny(3, 3, seed=seed + 1).p_S, tiny) < 1e-6


def test_a_prompt_conditions_what_follows() -> None:
    tiny, rows = Tiny(3, 3, seed=2), 3000
    sampler = AutoregressiveSampler(CausalOracle(tiny), tiny.mask_id, tiny.length)
    *_, frame = sampler.steps(canvas_of([[1]] * rows, 2, fill=tiny.mask_id), rng=generators(0, rows))
    conditional_S = tiny.p_S * (tiny.x_ST[:, 0] == 1)
    assert chi_square_p(frame.tokens_BT, conditional_S / conditional_S.sum(), tiny) > 1e-3


def network(**changes: Any) -> Transformer:
    sizes: dict[str, Any] = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 32, "attention": "causal"}
    sizes |= {"vocab_size": MASK + 1, "window": WINDOW}
    made, rng = Transformer(TransformerConfig(**(sizes | changes))), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=rng)
    return made.eval().requires_grad_(False)


def run(canvas: Canvas, *, cache: bool, context: int = 4, seed: int = 0, draw: Draw | None = None, window: int = WINDOW) -> list[Frame]:
    made = network()
    sampler = AutoregressiveSampler(made, MASK, window, made.cache if cache else None, draw or Draw(), context, "ar")
    return list(sampler.steps(canvas, rng=generators(seed, len(canvas.tokens_BT))))


PROMPTS = [[1, 2, 3], [], [4] * 11, [5] * 12, [6, 7] * 9]


@pytest.mark.parametrize("new", [5, 40])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_cached_equals_uncached(prompt: list[int], new: int) -> None:
    canvas = canvas_of([prompt, prompt[::-1]], new)
    cached, plain = (run(canvas, cache=cache) for cache in (True, False))
    assert len(cached) == len(plain) == new
    for a, b in zip(cached, plain, strict=True):
        assert torch.equal(a.tokens_BT, b.tokens_BT)
        assert torch.equal(a.settled_BT, b.settled_BT)
        assert a.forwards == b.forwards
    last = cached[-1].tokens_BT
    assert last.shape == (2, len(prompt) + new)
    assert (last < MASK).all()
    assert last[0, : len(prompt)].tolist() == prompt


class Reads:
    """The network between two listeners: what it is given each call."""

    def __init__(self) -> None:
        self.network, self.inputs = network(), list[Tensor]()

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **options: object) -> Tensor:
        self.inputs.append(z_BQ.clone())
        logits: Tensor = self.network(z_BQ, t_B, **options)
        return logits


@pytest.mark.parametrize("context", [0, 1, 4, 11])
def test_windows_tile_a_long_text_and_carry_their_context(context: int) -> None:
    """Without a cache each call reads MASK and then the text from the window's beginning, so the tiling is in plain sight."""
    listener, stride = Reads(), WINDOW - context
    sampler = AutoregressiveSampler(listener, MASK, WINDOW, context=context)
    *_, frame = sampler.steps(canvas_of([[1, 2, 3]], 40), rng=generators(0, 1))
    text = frame.tokens_BT[0].tolist()
    assert len(listener.inputs) == 40
    for column, z_1Q in enumerate(listener.inputs, 3):
        read = z_1Q[0].tolist()
        begin = column - len(read) + 1
        assert len(read) <= WINDOW
        assert begin % stride == 0
        assert read == [MASK, *text[begin:column]]
        assert begin == 0 or len(read) - 1 >= context


def test_every_token_has_the_probability_that_the_loss_gives_it() -> None:
    """Greedy text is what the training objective calls likeliest: sampler and loss read the same shifted input."""
    made = network()
    *_, frame = run(canvas_of([[1, 2]], WINDOW - 2), cache=True, draw=Draw(0.0))
    noise, x_BT, free_BT = MaskedNoise(MASK + 1, MASK), frame.tokens_BT, torch.ones(1, WINDOW, dtype=torch.bool)
    best = loss.autoregressive(noise, lambda z, t: made(z), x_BT, free_BT)
    for column in range(2, WINDOW):
        only_BT = torch.arange(WINDOW)[None] == column
        chosen = loss.autoregressive(noise, lambda z, t: made(z), x_BT, only_BT)
        for token in range(MASK):
            other_BT = torch.where(only_BT, token, x_BT)
            assert loss.autoregressive(noise, lambda z, t: made(z), other_BT, only_BT) >= chosen - 1e-5
    assert best.isfinite().all()


def test_a_cache_reads_each_token_once_a_window() -> None:
    listener = Reads()
    sampler = AutoregressiveSampler(listener, MASK, WINDOW, listener.network.cache, context=4)
    list(sampler.steps(canvas_of([[1, 2, 3]], 20), rng=generators(0, 1)))
    assert [z.shape[1] for z in listener.inputs] == [4, *[1] * 8, 5, *[1] * 7, 5, 1, 1]


def test_rows_with_different_prompts_are_as_each_alone() -> None:
    canvas = canvas_of(PROMPTS, 25)
    for cache in (True, False):
        *_, together = run(canvas, cache=cache, seed=3)
        for row, prompt in enumerate(PROMPTS):
            *_, alone = run(canvas_of([prompt], 25), cache=cache, seed=3 + row)
            assert torch.equal(alone.tokens_BT[0], together.tokens_BT[row, : len(prompt) + 25]), (row, cache)
        padding_BL = ~canvas.valid_BT
        assert torch.equal(together.tokens_BT[padding_BL], canvas.tokens_BT[padding_BL])


def test_rows_of_one_length_with_different_prompts() -> None:
    rows: list[list[int | None]] = [[*prompt, *[None] * (30 - len(prompt))] for prompt in PROMPTS]
    *_, together = run(Canvas.from_rows(rows, fill=MASK), cache=True, seed=3)
    for row, given in enumerate(rows):
        *_, alone = run(Canvas.from_rows([given], fill=MASK), cache=True, seed=3 + row)
        assert torch.equal(alone.tokens_BT[0], together.tokens_BT[row]), row


def test_frames_settle_from_left_to_right() -> None:
    frames = run(canvas_of([[1, 2, 3], [1]], 6), cache=True)
    assert len(frames) == 8
    assert [frame.forwards for frame in frames] == list(range(1, 9))
    assert all(frame.model == "ar" for frame in frames)
    for column, frame in enumerate(frames, 1):
        assert frame.settled_BT[0].tolist() == [j <= max(column, 2) for j in range(9)]
        assert frame.settled_BT[1].tolist() == [j <= column or j >= 7 for j in range(9)]
        assert torch.equal(frame.tokens_BT == MASK, ~frame.settled_BT | ~canvas_of([[1, 2, 3], [1]], 6).valid_BT)
    levels = torch.stack([frame.t_B for frame in frames])
    assert (levels[1:] <= levels[:-1]).all()
    assert levels[-1].tolist() == [0, 0]
    assert (levels <= 1).all()


@pytest.mark.parametrize("row", [[1, None, 2], [None, 1], [None, None, 3, None], [None, 1, None]])
def test_holes_are_refused(row: list[int | None]) -> None:
    with pytest.raises(InputError, match="cannot fill holes"):
        run(Canvas.from_rows([row], fill=MASK), cache=True)
    with pytest.raises(InputError, match="cannot fill holes"):  # also where a longer row stands beside it
        run(Canvas.from_rows([[1, 2, 3, None, None], row], fill=MASK), cache=True)


def test_a_shorter_row_is_not_a_hole() -> None:
    *_, frame = run(Canvas.from_rows([[1, 2, 3, None, None], [None]], fill=MASK), cache=True)
    assert frame.settled_BT.all()


@pytest.mark.parametrize("context", [-1, WINDOW, WINDOW + 1])
def test_a_context_that_leaves_no_room_is_told(context: int) -> None:
    with pytest.raises(InputError, match="context"):
        run(canvas_of([[1]], 30), cache=True, context=context)


def test_a_canvas_without_holes_needs_no_call() -> None:
    assert run(Canvas.from_rows([[1, 2]], fill=MASK), cache=True) == []


def test_rows_that_have_ended_wait_for_those_that_begin_later() -> None:
    """A short prompt whose text ends before a longer prompt does: columns in which nobody writes are passed over."""
    model = make_model("autoregressive", window=32, context=8)
    rows = [[1, None, None, None, None, None], [2, 3, 4, 5, 6, 7, None, None]]
    ends = frozenset(range(model.tokenizer.vocab_size))  # whatever comes first
    sampler = AutoregressiveSampler(model.network, model.tokenizer.mask_id, 32, model.network.cache, stop=ends)
    *_, frame = sampler.steps(Canvas.from_rows(rows, fill=model.tokenizer.mask_id), rng=generators(0, 2))
    for row, given in enumerate((1, 6)):
        *_, alone = sampler.steps(Canvas.from_rows([rows[row]], fill=model.tokenizer.mask_id), rng=generators(row, 1))
        assert frame.tokens_BT[row, given] == alone.tokens_BT[0, given]
