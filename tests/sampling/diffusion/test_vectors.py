"""Samplers of noise on vectors against an enumerated joint law: closer with steps, given tokens kept, a row by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlm.noise.gaussian import GaussianNoise
from dlm.sampling.diffusion.vectors import VectorSampler
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame, Trajectory
from oracle import Tiny, VectorBayes, chi_square_p, total_variation

TINY = Tiny(3, 2, seed=1)
NOISE = GaussianNoise(4, 3)
ROWS = 2000


def canvas(rows: int, given: dict[int, int] | None = None, length: int = 2) -> Canvas:
    row = [(given or {}).get(i) for i in range(length)]
    return Canvas.from_rows([row] * rows, fill=3)


def frames(on: Canvas, steps: int, flow: bool, **settings: object) -> list[Frame]:
    sampler = VectorSampler(VectorBayes(TINY), NOISE, 2, budget=steps, flow=flow, **settings)  # type: ignore[arg-type]
    return list(sampler.steps(on, rng=generators(0, len(on.tokens_BT))))


@pytest.mark.parametrize("flow", [False, True], ids=["ancestral", "flow"])
def test_samples_come_closer_to_the_joint_law_with_steps(flow: bool) -> None:
    tokens = {steps: frames(canvas(ROWS), steps, flow)[-1].tokens_BT for steps in (2, 6, 40)}
    distance = {steps: total_variation(x_BT, TINY) for steps, x_BT in tokens.items()}
    assert distance[2] > distance[6] > distance[40]
    assert chi_square_p(tokens[40], TINY.p_S, TINY) > 1e-3
    assert chi_square_p(tokens[2], TINY.p_S, TINY) < 1e-6  # positions that are drawn in so few steps do not agree


@pytest.mark.parametrize("flow", [False, True], ids=["ancestral", "flow"])
def test_a_given_token_stays_and_conditions_the_other(flow: bool) -> None:
    found = frames(canvas(ROWS, {0: 1}), 40, flow)
    assert all((frame.tokens_BT[:, 0] == 1).all() and frame.settled_BT[:, 0].all() for frame in found)
    law_S = TINY.p_S * (TINY.x_ST[:, 0] == 1)
    assert chi_square_p(found[-1].tokens_BT, law_S / law_S.sum(), TINY) > 1e-3


def test_frames_show_the_likeliest_tokens_and_settle_at_the_end() -> None:
    found = frames(canvas(5), 8, False)
    assert [frame.forwards for frame in found] == list(range(1, 9))
    assert not any(frame.settled_BT.any() for frame in found[:-1])
    assert found[-1].settled_BT.all()
    assert found[-1].likely is None
    for frame in found[:-1]:
        assert frame.likely is not None
        row, at, token, weight = frame.likely
        assert torch.equal(token[:, 0], frame.tokens_BT[row, at])
        assert (weight[:, :-1] >= weight[:, 1:]).all()
        assert torch.allclose(weight.sum(-1), torch.ones(10).double())
    sharpness = [float(frame.likely.weight[:, 0].mean()) for frame in found[:-1] if frame.likely is not None]
    assert sharpness[-1] > 0.8 > sharpness[0]


def test_a_row_alone_is_the_row_of_a_batch_and_long_texts_take_several_windows() -> None:
    on, alone = canvas(3, {1: 2}, length=5), canvas(1, {1: 2}, length=5)
    both = [frames(one, 6, False, context=1)[-1].tokens_BT for one in (on, alone)]
    assert torch.equal(both[0][:1], both[1])
    assert (both[0][:, 1] == 2).all()
    assert (both[0] < 3).all()


def test_temperature_0_follows_the_likeliest_token() -> None:
    cold = frames(canvas(50), 6, True, draw=Draw(0.0))[-1].tokens_BT
    assert len(cold.unique(dim=0)) < len(frames(canvas(50), 6, True)[-1].tokens_BT.unique(dim=0))


def test_a_run_with_blends_is_saved_and_loaded(tmp_path: object) -> None:
    run = Trajectory(torch.full((2, 2), 3), on := canvas(2), pieces={0: "a", 1: "b", 2: "c"}, mask_id=3)
    for frame in frames(on, 4, False):
        run.append(frame)
    run.save(f"{tmp_path}/run.traj")
    loaded = Trajectory.load(f"{tmp_path}/run.traj")
    assert loaded.has_blends
    for k in range(len(run)):
        for (at, before), (place, after) in zip(run.likely(k, 1).items(), loaded.likely(k, 1).items(), strict=True):
            assert (at, [token for token, _ in before]) == (place, [token for token, _ in after])
            assert [weight for _, weight in after] == pytest.approx([weight for _, weight in before])
    assert [len(run.likely(k, 0)) for k in range(len(run))] == [0, 2, 2, 2, 0]
    first: Tensor = run.start_BT
    assert torch.equal(first, loaded.start_BT)
