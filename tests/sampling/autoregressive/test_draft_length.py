"""A pace settles on the stride that commits the most tokens a second, and notices when another one would."""

from __future__ import annotations

import math
import random

import pytest

from dlm.sampling.autoregressive.draft_length import AdaptiveDraftLength, tokens_per_forward


def paced(pace: AdaptiveDraftLength, seconds: dict[int, float], chance: float, calls: int, seed: int = 0, rows: int = 1) -> list[int]:
    """The strides that a pace chooses where calls of each take so long, and every proposal holds with this chance."""
    rng, chosen = random.Random(seed), []
    for _ in range(calls):
        stride = pace.choose(rows)
        chosen.append(stride)
        held = [next((k for k in range(stride - 1) if rng.random() >= chance), stride - 1) for _ in range(rows)]
        pace.record(rows, stride, seconds[stride] * rng.uniform(0.9, 1.1), held)
    return chosen


@pytest.mark.parametrize(
    ("seconds", "chance", "best", "tried"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0}, 0.3, 4, {1, 2, 4}),  # calls of any length cost the same: a GPU, a single row
        ({1: 1.0, 2: 1.4, 4: 2.4}, 0.3, 1, None),  # 1.3 tokens at most for 1.4; 4 is at the edge of what may pay
        ({1: 1.0, 2: 1.6, 4: 2.6}, 0.3, 1, {1, 2}),  # 1.3 tokens at most for 1.6
        ({1: 1.0, 2: 1.1, 4: 2.4}, 0.5, 2, {1, 2, 4}),  # 1.5 for 1.1, 1.875 for 2.4
        ({1: 1.0, 2: 1.4, 4: 1.8}, 0.9, 4, {1, 2, 4}),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 0.9, 1, {1, 2}),  # a machine that is busy with one position: nothing can pay
    ],
)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_pace_takes_what_pays(seconds: dict[int, float], chance: float, best: int, tried: set[int] | None, rows: int) -> None:
    """From plain decoding up, and no further than it can pay."""
    chosen = paced(AdaptiveDraftLength(4), seconds, chance, 600, rows=rows)
    assert chosen[:6] == [1] * 3 + [2] * 3
    assert tried in (None, set(chosen[:9]))
    late = chosen[300:]
    assert late.count(best) >= 0.8 * len(late)


def test_a_pace_notices_when_it_changes() -> None:
    """A text that begins to repeat itself: proposals that did not hold do now, at a cost that was too high."""
    pace, seconds = AdaptiveDraftLength(4), {1: 1.0, 2: 1.2, 4: 1.7}
    assert paced(pace, seconds, 0.1, 300)[-20:].count(1) >= 19
    assert paced(pace, seconds, 0.95, 900)[-20:].count(4) >= 19


def test_rows_are_learned_of_by_their_number() -> None:
    pace = AdaptiveDraftLength(2)
    paced(pace, {1: 1.0, 2: 1.1}, 0.9, 50)
    assert pace.choose(1) == 2
    paced(pace, {1: 1.0, 2: 2.5}, 0.9, 50, rows=16)
    assert pace.choose(16) == 1
    assert pace.choose(1) == 2
    assert [pace.choose(9) for _ in range(3)] == [1, 1, 1]  # as 16


def test_tokens_per_forward() -> None:
    for n in (2, 3, 4, 8):  # I-DLM's closed form
        for p in (0.5, 0.8, 0.9, 0.95):
            closed = (2 + sum(p**k for k in range(1, n - 1))) / (2 - p ** (n - 1))
            assert tokens_per_forward([p] * (n - 1)) == pytest.approx(closed)
    assert (round(tokens_per_forward([0.9] * 3), 2), round(tokens_per_forward([0.9] * 3, restart=False), 2)) == (2.92, 3.44)
    assert tokens_per_forward([0.0] * 3) == 1.0
    assert tokens_per_forward([1.0] * 3) == 4.0
    assert math.isclose(tokens_per_forward([1.0, 0.0]), (2 + 1) / 2)  # two tokens, then one and new drafts
