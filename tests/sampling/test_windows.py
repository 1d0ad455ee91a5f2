"""A long text through a short window: every position once, each with its context, no row on another's account.

Shapes: B rows, A rows of one call, L positions of the canvas, T of the window, V vocabulary.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dlm.noise.masked import MaskedNoise
from dlm.sampling import windows
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import Rule
from dlm.sampling.diffusion.unmasking import Ancestral, Threshold, TopScore
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame

VOCAB = 100
RULES: list[Rule] = [Ancestral(Draw(0.0)), TopScore(Draw(0.0)), Threshold(0.9, Draw(0.0))]


class Counter:
    """Where the text is 0, 1, 2, ... every visible token tells the place of the window, so its holes can be counted out.

    Without a visible token it begins at 0. Two visible tokens that disagree fail the test: the window is then torn.
    """

    def __init__(self, window: int) -> None:
        self.window, self.seen = window, list[Tensor]()

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **_: object) -> Tensor:
        assert z_BQ.shape[1] == self.window
        self.seen.append(z_BQ.clone())
        place_Q = torch.arange(self.window)
        start_BQ = torch.where(z_BQ < VOCAB, z_BQ - place_Q, -1)
        start_B = start_BQ.max(-1).values.clamp(min=0)
        assert ((start_BQ == start_B[:, None]) | (z_BQ == VOCAB)).all(), z_BQ
        token_BQ = (start_B[:, None] + place_Q).clamp(max=VOCAB - 1)
        return 50 * torch.nn.functional.one_hot(token_BQ, VOCAB + 1).float()


def run(
    rows: list[list[int | None]], window: int, context: int, rule: Rule = RULES[0], steps: int = 4, fill: int = VOCAB
) -> tuple[Counter, list[Frame]]:
    counter = Counter(window)
    sampler = DiffusionSampler(counter, MaskedNoise(VOCAB + 1, VOCAB), window, rule, steps, context)
    return counter, list(sampler.steps(Canvas.from_rows(rows, fill=fill), rng=generators(0, len(rows))))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("window", "context"), [(8, 2), (8, 7), (8, 1), (5, 4), (30, 3), (64, 0)])
def test_a_long_text_counts_on_across_its_windows(window: int, context: int, rule: Rule) -> None:
    _, frames = run([[None] * 30], window, context, rule)
    assert frames[-1].tokens_BT[0].tolist() == list(range(30))


@pytest.mark.parametrize("rule", RULES)
def test_without_context_windows_are_strangers(rule: Rule) -> None:
    _, frames = run([[None] * 20], 8, 0, rule)
    assert frames[-1].tokens_BT[0].tolist() == [*range(8), *range(8), *range(4)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("window", "context"), [(8, 2), (8, 0), (6, 5)])
def test_every_position_is_written_exactly_once_window_after_window(window: int, context: int, rule: Rule) -> None:
    rows: list[list[int | None]] = [[None] * 23, [0, 1, 2, *[None] * 10], [*range(10), *[None] * 9, 19]]
    rows = rows if context else rows[:1]  # without context the others could not be counted out
    free_BL = Canvas.from_rows(rows, fill=VOCAB).free_BT
    _, frames = run(rows, window, context, rule)
    writes_BL, end_B = torch.zeros_like(free_BL, dtype=torch.long), [0] * len(rows)
    state_BL = torch.where(free_BL, VOCAB, frames[0].tokens_BT)
    for frame in frames:
        new_BL = frame.tokens_BT != state_BL
        assert (state_BL[new_BL] == VOCAB).all()
        writes_BL += new_BL
        for row in range(len(rows)):
            written = new_BL[row].nonzero().flatten().tolist()
            if written:  # windows come in order: nothing is left open behind them
                hole = int((state_BL[row] == VOCAB).nonzero().min())
                assert max(written) < hole + window
                assert max(written) > end_B[row] - window
                end_B[row] = max(end_B[row], max(written))
        state_BL = frame.tokens_BT
    assert torch.equal(writes_BL, free_BL.long())
    assert frames[-1].settled_BT.all()


def test_tiles_start_where_the_first_hole_has_its_context() -> None:
    for window, context in ((8, 2), (8, 0), (8, 7), (5, 1)):
        stride = window - context
        for first in range(40):
            open_BL = torch.zeros(1, 41, dtype=torch.bool)
            open_BL[0, first] = True
            start = int(windows.start(open_BL, window, context))
            assert start % stride == 0
            assert start <= first < start + window
            assert start == 0 or first - start >= context
            assert start + stride > first - context  # and the next tile would be too late


@pytest.mark.parametrize("rule", RULES)
def test_context_is_seen_and_the_prompt_may_be_longer_than_the_window(rule: Rule) -> None:
    for given, (window, context) in itertools.product((1, 7, 8, 9, 20, 21), ((8, 3), (8, 1), (6, 5))):
        counter, frames = run([[*range(given), *[None] * 15]], window, context, rule)
        assert frames[-1].tokens_BT[0].tolist() == list(range(given + 15))
        for z_1T in counter.seen:
            visible = int((z_1T[0] < VOCAB).int().cumprod(-1).sum())  # unbroken from the left
            assert visible >= min(given, context)
        assert len(counter.seen) <= 4 * (1 + -(-(given + 15) // (window - context)))


@pytest.mark.parametrize("rule", RULES)
def test_a_canvas_shorter_than_the_window_is_followed_by_masks_for_ever(rule: Rule) -> None:
    counter, frames = run([[0, None, None, None, 4], [0, None]], 8, 2, rule)
    assert frames[-1].tokens_BT.shape == (2, 5)
    assert frames[-1].tokens_BT[0].tolist() == [0, 1, 2, 3, 4]
    assert frames[-1].tokens_BT[1, :2].tolist() == [0, 1]
    for z_AT in counter.seen:
        assert z_AT.shape[1] == 8
        assert (z_AT[:, 5:] == VOCAB).all()


@pytest.mark.parametrize("fill", [VOCAB, 0, 7])
@pytest.mark.parametrize("rule", RULES)
def test_padding_is_noise_whatever_the_canvas_holds_there(rule: Rule, fill: int) -> None:
    """What pads a row to its neighbours' length is not text: the network must see what it would see if the row were alone."""
    rows: list[list[int | None]] = [[None] * 17, [0, None, None], [0, 1, 2, 3, 4, 5, 6, 7, 8, None]]
    counter, frames = run(rows, 8, 2, rule, fill=fill)
    assert frames[-1].tokens_BT[0].tolist() == list(range(17))
    for row, given in enumerate(rows):
        assert frames[-1].tokens_BT[row, : len(given)].tolist() == list(range(len(given)))
        assert (frames[-1].tokens_BT[row, len(given) :] == fill).all()
    assert all((z_AT[1, 3:] == VOCAB).all() for z_AT in counter.seen[:1])


@pytest.mark.parametrize("rule", [Ancestral(), TopScore(), Threshold(0.5)])
@pytest.mark.parametrize("context", [0, 3])
def test_rows_of_different_lengths_are_as_each_alone(rule: Rule, context: int) -> None:
    table_TV = torch.randn(8, VOCAB + 1, generator=torch.Generator().manual_seed(0))

    def guess(z_BQ: Tensor, t_B: Tensor | None = None, **_: object) -> Tensor:
        mean_B = (z_BQ * torch.arange(1, 9)).sum(-1) % 7
        return table_TV * (1 + mean_B[:, None, None])

    rows: list[list[int | None]] = [[None] * 30, [1, 2, None], [5] * 12 + [None] * 9, [None, 3, None, 4] * 5, [*[7] * 25, None]]

    def fill(chosen: list[int]) -> Tensor:
        sampler = DiffusionSampler(guess, MaskedNoise(VOCAB + 1, VOCAB), 8, rule, 4, context)
        rng = [generators(3 + i, 1)[0] for i in chosen]
        *_, last = sampler.steps(Canvas.from_rows([rows[i] for i in chosen], fill=VOCAB), rng=rng)
        return last.tokens_BT

    together = fill([0, 1, 2, 3, 4])
    for row, given in enumerate(rows):
        assert torch.equal(fill([row])[0], together[row, : len(given)]), row
    assert torch.equal(fill([3, 1])[1, :3], together[1, :3])


def test_take_and_put_are_inverse() -> None:
    x_BL = torch.arange(24).view(2, 12)
    start_B = torch.tensor([0, 4])
    taken = windows.take(x_BL, start_B, 8)
    assert taken.tolist() == [[*range(8)], [*range(16, 24)]]
    copy = x_BL.clone()
    where = torch.zeros(2, 8, dtype=torch.bool)
    where[0, 3] = where[1, 0] = where[1, 4] = True
    windows.put(copy, torch.tensor([0, 1]), start_B, taken + 100, where)
    assert (copy != x_BL).nonzero().tolist() == [[0, 3], [1, 4], [1, 8]]
    assert copy[1, 8] == 120
