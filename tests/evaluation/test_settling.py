"""Settling measured on runs whose every frame is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.evaluation.settling import settling
from dlm.trajectory import Canvas, Frame, Trajectory

MASK = 9


def run(frames: list[list[list[int]]], free: list[list[bool]] | None = None, sampler: str = "by hand") -> Trajectory:
    """frames: S x B x T token ids."""
    states_SBT = torch.tensor(frames)
    free_BT = torch.ones_like(states_SBT[0], dtype=torch.bool) if free is None else torch.tensor(free)
    canvas = Canvas(states_SBT[0], free_BT, torch.ones_like(free_BT))
    made = Trajectory(states_SBT[0], canvas, pieces={i: str(i) for i in range(9)}, mask_id=MASK, meta={"model": "m", "sampler": sampler})
    for k, state_BT in enumerate(states_SBT[1:], 1):
        made.append(Frame(state_BT, torch.zeros_like(free_BT), torch.zeros(len(state_BT)), "", k))
    return made


FIRST = [[[1, 2, 3, 4]], [[1, 5, 3, 7]], [[1, 2, 3, 8]], [[1, 2, 6, 8]]]


def test_one_text_by_hand() -> None:
    one = settling([run(FIRST)])
    assert one.label == "m, by hand"
    assert one.texts == 1
    assert one.steps == 3
    assert one.changed.mean_S.tolist() == [0, 0.5, 0.5, 0.25]
    assert one.settled.mean_S.tolist() == [0.25, 0.25, 0.75, 1]  # position 0 never changes, 1 and 3 last in frame 2, 2 in frame 3
    assert one.error.mean_S.tolist() == [0.5, 0.75, 0.25, 0]  # position 1 comes back to where it began
    assert one.edits == 1.25
    assert one.last_step == 3
    assert one.step_of(0.5) == 2
    assert one.step_of(1.0) == 3
    assert one.step_of(0.2) == 0
    assert all(math.isnan(x) for x in one.settled.band_S.tolist())
    assert math.isnan(one.edits_stderr)


def test_given_positions_do_not_count() -> None:
    one = settling([run(FIRST, [[False, True, False, True]])])
    assert one.changed.mean_S.tolist() == [0, 1, 1, 0]
    assert one.edits == 2
    assert one.last_step == 2


def test_rows_and_runs_are_pooled_with_a_band() -> None:
    second = [[[1, 1, 1, 1]], [[2, 1, 1, 1]], [[2, 1, 1, 1]], [[2, 1, 1, 1]]]
    apart = settling([run(FIRST), run(second)])
    together = settling([run([[*a, *b] for a, b in zip(FIRST, second, strict=True)])])
    for name in ("settled", "changed", "error"):
        assert torch.equal(getattr(apart, name).mean_S, getattr(together, name).mean_S)
        assert torch.equal(getattr(apart, name).band_S, getattr(together, name).band_S)
    assert apart.texts == 2
    assert apart.edits == 0.75
    assert apart.last_step == 2
    values = torch.tensor([0.5, 0.25]).double()
    assert apart.changed.mean_S[1] == values.mean()
    assert float(apart.changed.band_S[1]) == pytest.approx(12.7062 * float(values.std()) / 2**0.5, rel=1e-5)  # Student's t of one degree


def test_the_judge_reads_whole_texts_and_masks_as_noise() -> None:
    seen: list[Tensor] = []

    def judge(x_BT: Tensor) -> Tensor:
        seen.append(x_BT)
        return (x_BT == 8).double().sum(-1)

    one = settling([run([[[MASK, MASK, MASK, MASK]], [[8, MASK, 8, MASK]], [[8, 8, 8, 8]]])], judge=judge, vocab_size=4)
    assert one.bits is not None
    assert one.bits.mean_S.tolist() == [0, 2, 4]
    assert all((x_BT != MASK).all() for x_BT in seen)
    assert (seen[0] < 4).all()


def test_frames_between_those_judged_lie_on_a_line() -> None:
    frames = [[[0] * 4]] + [[[8] * 4]] * 8
    one = settling([run(frames)], judge=lambda x_BT: (x_BT == 8).double().sum(-1), vocab_size=4, points=3)
    assert one.bits is not None
    assert one.bits.mean_S.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4]


def test_runs_of_different_lengths_are_told() -> None:
    with pytest.raises(InputError, match=r"equally many steps, these have \[2, 3\]"):
        settling([run(FIRST), run(FIRST[:3])])
