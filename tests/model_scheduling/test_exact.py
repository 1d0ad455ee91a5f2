"""Schedules on sources small enough to enumerate, where nothing has to be judged."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.model_scheduling import search
from dlm.model_scheduling.exact import Enumerated, MarkovPosterior
from dlm.model_scheduling.plan import ModelSchedule
from dlm.model_scheduling.routing import Scheduled
from dlm.noise.masked import MaskedNoise
from dlm.protocols import Denoiser
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.unmasking import Ancestral, FirstHitting
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas
from oracle import BayesDenoiser, Tiny, chi_square_of_counts

TINY = Tiny(vocab=3, length=4, seed=3)


class Blurred:
    """The exact posterior, mixed with the uniform guess: the light model."""

    def __init__(self, tiny: Tiny, share: float = 0.5) -> None:
        self.inner, self.share, self.tiny = BayesDenoiser(tiny), share, tiny

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **how: Any) -> Tensor:
        p_BQV = self.inner(z_BQ, t_B, **how).exp()
        uniform_V = torch.full((self.tiny.vocab + 1,), 1 / self.tiny.vocab, dtype=torch.float64)
        uniform_V[-1] = 0
        return ((1 - self.share) * p_BQV + self.share * uniform_V).clamp(min=1e-300).log()


MODELS: dict[str, Denoiser] = {"H": BayesDenoiser(TINY), "L": Blurred(TINY)}
WRITTEN_OUT = Enumerated(MODELS, TINY.vocab, TINY.length)


def kl(p_S: Tensor, q_S: Tensor) -> float:
    return float((p_S * (p_S / q_S).log()).sum())


def path(keys: Sequence[str]) -> float:
    return sum(nats for nats, key in zip(WRITTEN_OUT.step_kl("L", "H"), keys, strict=True) if key == "L")


def path_written_out(keys: Sequence[str]) -> float:
    """KL between the laws of (order, text), order by order."""
    nats = 0.0
    for order in itertools.permutations(range(4)):
        logs = dict.fromkeys("HX", torch.zeros(81, dtype=torch.float64))
        for step, i in enumerate(order):
            known = frozenset(order[:step])
            for chain, key in (("H", "H"), ("X", keys[step])):
                logs[chain] = logs[chain] + WRITTEN_OUT.log_p[key][known][:, i]
        nats += float((logs["H"].exp() * (logs["H"] - logs["X"])).sum()) / 24
    return nats


def test_the_heavy_model_alone_has_the_law_of_the_source() -> None:
    torch.testing.assert_close(WRITTEN_OUT.distribution("HHHH"), TINY.p_S, atol=1e-9, rtol=0)


def test_the_kl_of_texts_is_at_most_that_of_paths_and_that_is_additive() -> None:
    alone = WRITTEN_OUT.step_kl("L", "H")
    assert min(alone) > 0
    for keys in itertools.product("HL", repeat=4):
        assert kl(TINY.p_S, WRITTEN_OUT.distribution(keys)) <= path(keys) + 1e-9
        assert path(keys) == pytest.approx(path_written_out(keys), rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_steps_of_least_kl_have_the_least_path_kl_of_all(count: int) -> None:
    found = search.by_kl({"H": [0.0] * 4, "L": WRITTEN_OUT.step_kl("L", "H")}, {"H": 6.0, "L": 2.0}, saved=count / 4 * (1 - 2 / 6))
    ways = [schedule.each(4) for schedule in search.exhaustive(4, count)]
    assert found.each(4).count("L") == count
    assert path(found.each(4)) == pytest.approx(min(map(path, ways)))


@pytest.mark.slow
@pytest.mark.parametrize("word", ["L0.25 H0.75", "H0.5 L0.5", "L0.5 H0.25 L0.25"])
def test_first_hitting_under_a_schedule_has_the_law_that_is_written_out(word: str) -> None:
    """Its clock is uniform between tokens: how many are known when the model changes is binomial."""
    rows = 6000
    sampler = DiffusionSampler(Scheduled(MODELS, ModelSchedule.parse(word)), MaskedNoise(4, 3), 4, FirstHitting())
    canvas = Canvas.from_rows([[None] * 4] * rows, fill=3)
    frames = list(sampler.steps(canvas, rng=generators(0, rows)))
    counts_S = torch.bincount(TINY.index(frames[-1].tokens_BT), minlength=81)
    expected_S = torch.zeros(81, dtype=torch.float64)
    schedule = ModelSchedule.parse(word)
    draws = torch.rand(20000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sort(-1).values
    patterns = torch.tensor([[key == "L" for key in schedule.keys(row)] for row in draws.unbind()])
    for keys_4, number in zip(*patterns.unique(dim=0, return_counts=True), strict=True):
        expected_S += WRITTEN_OUT.distribution(["L" if light else "H" for light in keys_4]) * number / len(draws)
    assert chi_square_of_counts(counts_S, expected_S) > 1e-3


def test_rows_of_one_call_are_read_by_their_own_models() -> None:
    """A batch in which rows are at different steps gives each the logits that it gets alone."""
    router = Scheduled(MODELS, ModelSchedule.parse("L0.5 H0.5"))
    z_BT = torch.tensor([[3, 3, 0, 3], [3, 1, 0, 3], [3, 3, 3, 3], [2, 3, 0, 1]])
    t_B = torch.tensor([0.9, 0.3, 0.7, 0.1], dtype=torch.float64)
    together = router(z_BT, t_B)
    assert router.taken == "HL"
    for b, key in enumerate("LHLH"):
        assert torch.equal(together[b], MODELS[key](z_BT[b : b + 1], t_B[b : b + 1])[0])


def test_frames_name_the_models_that_took_the_step() -> None:
    sampler = DiffusionSampler(Scheduled(MODELS, ModelSchedule.parse("L0.5 H0.5")), MaskedNoise(4, 3), 4, Ancestral(), budget=4)
    canvas = Canvas.from_rows([[None] * 4] * 64, fill=3)
    models = [frame.model for frame in sampler.steps(canvas, rng=generators(0, 64))]
    assert models[0] in ("L", "HL")
    assert models[-1] == "H"


def test_the_posterior_of_a_markov_chain_is_that_of_its_texts() -> None:
    transition = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.1, 0.6, 0.3]], dtype=torch.float64)
    posterior, tiny = MarkovPosterior(transition, 4), Tiny(3, 4)
    steps_S = transition[tiny.x_ST[:, :-1], tiny.x_ST[:, 1:]].prod(-1)
    tiny.p_S = posterior.stationary_V[tiny.x_ST[:, 0]] * steps_S
    z_ZT = torch.tensor(list(itertools.product(range(4), repeat=4)))
    torch.testing.assert_close(posterior(z_ZT).exp(), BayesDenoiser(tiny)(z_ZT).exp(), atol=1e-9, rtol=0)


def test_a_short_reach_sees_neighbours_alone() -> None:
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    near = MarkovPosterior(transition, 4, reach=1)(torch.tensor([[0, 2, 2, 2]])).exp()[0]
    torch.testing.assert_close(near[1, :2], transition[0])
    torch.testing.assert_close(near[2, :2], torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
