"""Speculative any-order decoding: the distribution of one token a forward pass in random order, in fewer passes.

Shapes: B rows, T positions, V vocabulary, S = V^T sequences.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from chains import any_order_law, copies
from dlm.errors import InputError
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
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


def run(denoiser: Any, draft_tokens: int, given: Given = HOLE, rows: int = ROWS, seed: int = 0, **options: Any) -> list[Frame]:
    sampler = AnyOrderSpeculativeSampler(denoiser, NOISE, TINY.length, draft_tokens, **options)
    frames = list(sampler.steps(copies(given, TINY.mask_id, rows), rng=generators(seed, rows)))
    assert frames[-1].settled_BT.all()
    return frames


@pytest.mark.parametrize("draft_tokens", [1, 2, 3, 8])
def test_the_posterior_gives_back_the_data(draft_tokens: int) -> None:
    assert chi_square_p(run(BayesDenoiser(TINY), draft_tokens)[-1].tokens_BT, TINY.p_S, TINY) > 1e-3


@pytest.mark.parametrize("draw", [Draw(), Draw(0.6), Draw(1.3, top_p=0.9)], ids=str)
@pytest.mark.parametrize("given", [HOLE, (None, 1, None, None)], ids=str)
def test_a_network_that_contradicts_itself_keeps_its_own_law(given: Given, draw: Draw) -> None:
    """Its guesses depend on what it sees, so that proposals are often rejected."""
    law_S = any_order_law(TINY, Noted(TINY.vocab, TINY.length), given, draw)
    samples = run(Noted(TINY.vocab, TINY.length), 4, given, draw=draw)[-1].tokens_BT
    assert chi_square_p(samples, law_S, TINY) > 1e-3


def test_a_network_with_short_convolutions_keeps_its_own_law() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(TINY.vocab + 1, TINY.length, layers=2, heads=2, width=16, conv=3)).double().requires_grad_(False)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    samples = run(model, 3)[-1].tokens_BT
    assert chi_square_p(samples, any_order_law(TINY, model), TINY) > 1e-3
    assert chi_square_p(samples, any_order_law(TINY, Noted(TINY.vocab, TINY.length)), TINY) < 1e-6


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


@pytest.mark.slow
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


@pytest.mark.parametrize(("draft_tokens", "calls"), [(1, 30), (5, 7), (8, 5), (100, 2)])
def test_tokens_per_pass(draft_tokens: int, calls: int) -> None:
    """The first call has nothing to verify and writes one token; the others write all that they propose."""
    sampler = AnyOrderSpeculativeSampler(Independent(), MaskedNoise(5, 4), 30, draft_tokens)
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


LARGE = """
import resource
import torch
from torch import Tensor

from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion.any_order_speculative import AnyOrderSpeculativeSampler
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas

V, WINDOW, K = 126_000, 4_096, 8


class Due:
    'A network that gives logits where they are asked for: one row of numbers, seen from everywhere.'

    def __init__(self) -> None:
        self.logits_V, self.asked = torch.arange(V).remainder(7).float(), list[int]()

    def __call__(self, z_BQ: Tensor, t_B: Tensor, *, at_BQ: Tensor) -> Tensor:
        self.asked.append(int(at_BQ.sum(-1).max()))
        return self.logits_V.expand(*z_BQ.shape, V)


def resident(word: str) -> int:
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(word)) * 1024


network = Due()
sampler = AnyOrderSpeculativeSampler(network, MaskedNoise(V, V - 1), WINDOW, K)
frames = sampler.steps(Canvas.from_rows([[None] * WINDOW], fill=V - 1), rng=generators(0, 1))
torch.rand(10).softmax(0)
resource.setrlimit(resource.RLIMIT_AS, (resident('VmSize') + 1_000_000_000,) * 2)
settled = [int(next(frames).settled_BT.sum()) for _ in range(4)]
print(settled, max(network.asked))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_a_large_vocabulary_and_window_take_memory_for_the_drafts_alone() -> None:
    """A float64 distribution of every position is 4 GB a row; those of 8 draft tokens and 8 verified ones take far below 1 GB."""
    code = [sys.executable, "-c", LARGE]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[1, 9, 17, 25] 9"


@pytest.mark.parametrize(
    "bad", [{"draft_tokens": 0}, {"draft_tokens": 257}, {"tolerance": -0.1}, {"tolerance": float("nan")}, {"context": 4}]
)
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        AnyOrderSpeculativeSampler(BayesDenoiser(TINY), NOISE, TINY.length, **bad)
