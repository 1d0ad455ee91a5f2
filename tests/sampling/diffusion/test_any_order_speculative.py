"""Speculative any-order decoding: the law of one token a call in random order, in fewer calls.

Shapes: B rows, T positions, V vocabulary, S = V^T sequences.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chains import any_order_law, copies
from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion.any_order_speculative import AnyOrderSpeculativeSampler
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.unmasking import FirstHitting
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame
from oracle import BayesDenoiser, Noted, Tiny, chi_square_p, total_variation

ROWS = 4000
TINY = Tiny(3, 4, seed=0, concentration=0.2)
NOISE = MaskedNoise(TINY.vocab + 1, TINY.mask_id)
Given = tuple[int | None, ...]
HOLE: Given = (None,) * TINY.length


def run(denoiser: Any, proposals: int, given: Given = HOLE, rows: int = ROWS, seed: int = 0, **options: Any) -> list[Frame]:
    sampler = AnyOrderSpeculativeSampler(denoiser, NOISE, TINY.length, proposals, **options)
    frames = list(sampler.steps(copies(given, TINY.mask_id, rows), rng=generators(seed, rows)))
    assert frames[-1].settled_BT.all()
    return frames


@pytest.mark.parametrize("proposals", [1, 2, 3, 8])
def test_the_posterior_gives_back_the_data(proposals: int) -> None:
    assert chi_square_p(run(BayesDenoiser(TINY), proposals)[-1].tokens_BT, TINY.p_S, TINY) > 1e-3


@pytest.mark.parametrize("draw", [Draw(), Draw(0.6), Draw(1.3, top_p=0.9)], ids=str)
@pytest.mark.parametrize("given", [HOLE, (None, 1, None, None)], ids=str)
def test_a_network_that_contradicts_itself_keeps_its_own_law(given: Given, draw: Draw) -> None:
    """Its guesses depend on what it sees, so that proposals are often rejected."""
    law_S = any_order_law(TINY, Noted(TINY.vocab, TINY.length), given, draw)
    samples = run(Noted(TINY.vocab, TINY.length), 4, given, draw=draw)[-1].tokens_BT
    assert chi_square_p(samples, law_S, TINY) > 1e-3


def test_drawing_proposals_without_verifying_them_would_be_seen() -> None:
    """The distance that the test above has to see: everything drawn at once."""
    law_S = any_order_law(TINY, Noted(TINY.vocab, TINY.length))
    loose = run(Noted(TINY.vocab, TINY.length), 4, tolerance=1e9)[-1].tokens_BT
    assert chi_square_p(loose, law_S, TINY) < 1e-6


def test_one_proposal_is_first_hitting() -> None:
    denoiser = BayesDenoiser(TINY)
    sampler = DiffusionSampler(denoiser, NOISE, TINY.length, FirstHitting())
    frames = list(sampler.steps(copies(HOLE, TINY.mask_id, ROWS), rng=generators(0, ROWS)))
    assert len(frames) == TINY.length
    assert len(run(denoiser, 1)) == TINY.length
    assert chi_square_p(frames[-1].tokens_BT, TINY.p_S, TINY) > 1e-3


@pytest.mark.parametrize("tolerance", [0.1, 0.5])
def test_a_tolerance_bounds_the_distance(tolerance: float) -> None:
    denoiser = Noted(TINY.vocab, TINY.length)
    exact_S, samples = any_order_law(TINY, denoiser), run(denoiser, 4, tolerance=tolerance, rows=20_000)[-1].tokens_BT
    counts_S = torch.bincount(TINY.index(samples), minlength=len(exact_S)).double()
    distance = float((counts_S / counts_S.sum() - exact_S).abs().sum() / 2)
    drawn_N = torch.multinomial(TINY.p_S, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    noise = total_variation(TINY.x_ST[drawn_N], TINY)
    print(f"tolerance {tolerance}: total variation {distance:.4f}, {noise:.4f} of it is chance")
    assert distance < 1 - (1 - tolerance / (1 + tolerance)) ** TINY.length + noise
    calls = [len(run(denoiser, 4, rows=1, seed=seed, tolerance=tolerance)) for seed in range(200)]
    strict = [len(run(denoiser, 4, rows=1, seed=seed)) for seed in range(200)]
    assert sum(calls) < sum(strict)


class Independent:
    """Positions that say nothing of each other: every proposal is right."""

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **_: object) -> Tensor:
        return torch.linspace(0, 1, 5).expand(*z_BQ.shape, 5)


@pytest.mark.parametrize(("proposals", "calls"), [(1, 30), (5, 7), (8, 5), (100, 2)])
def test_tokens_per_call(proposals: int, calls: int) -> None:
    """The first call has nothing to verify and writes one token; the others write all that they propose."""
    sampler = AnyOrderSpeculativeSampler(Independent(), MaskedNoise(5, 4), 30, proposals)
    frames = list(sampler.steps(Canvas.from_rows([[None] * 30], fill=4), rng=generators(0, 1)))
    assert len(frames) == frames[-1].forwards == calls


def test_a_row_alone_and_in_a_batch() -> None:
    rows: list[list[int | None]] = [[None] * 20, [1, None, 2, None, None], [None] * 7, [0, 1] + [None] * 11]
    model, noise = Noted(4, 8), MaskedNoise(5, 4)

    def sample(rows: list[list[int | None]], seed: int) -> Tensor:
        sampler = AnyOrderSpeculativeSampler(model, noise, 8, 3, context=2)
        return list(sampler.steps(Canvas.from_rows(rows, fill=4), rng=generators(seed, len(rows))))[-1].tokens_BT

    together = sample(rows, 5)
    for i, row in enumerate(rows):
        alone = sample([row], 5 + i)[0]
        assert torch.equal(alone, together[i, : len(row)])
        assert all(given is None or given == token for given, token in zip(row, alone.tolist(), strict=True))
        assert (alone != 4).all()


@pytest.mark.parametrize("bad", [{"proposals": 0}, {"tolerance": -0.1}, {"tolerance": float("nan")}, {"context": 4}])
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        AnyOrderSpeculativeSampler(BayesDenoiser(TINY), NOISE, TINY.length, **bad)
