"""Rules that may change a token again, on any canvas: what stays, when text is settled, which rule a word means.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from chains import REPLACING, ROWS, TINY, bayes, copies, noise_of, prior_of, sample
from dlm.errors import InputError
from dlm.sampling import registry
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import Rule
from dlm.sampling.diffusion.revising import ChangeWorst, EntropyBound, GreedyTail, PredictorCorrector, Refine, Reverse
from dlm.sampling.diffusion.unmasking import Ancestral, Threshold
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame, Trajectory
from oracle import Noted

RULES: dict[str, Rule] = {
    "reverse": Reverse(),
    "cold": Reverse(Draw(0.0)),
    "truncated": Reverse(Draw(0.7, top_k=3)),
    "corrected": PredictorCorrector(0.5),
    "refine": Refine(),
    "entropy": EntropyBound(2.0),
    "worst": ChangeWorst(3.0),
    "greedy": GreedyTail(Reverse(), 2),
}
CASES = [("masked", "corrected"), *itertools.product(REPLACING, RULES)]
FEWER = [("masked", "corrected"), *zip(itertools.cycle(["hybrid", "uniform", "hybrid", "semantic"]), RULES, strict=False)]


def test_a_shape_that_forbids_the_visible_token_leaves_text() -> None:
    """Without uniform noise a visible token is certain, whatever temperature 0 or top-k would rather have there."""
    for more in ({"process": "hybrid", "share": 0.0}, {"process": "semantic", "clusters": [0, 1, 0, 2, 1], "to": "mask"}):
        noise = noise_of("masked", vocab=5, **more)
        for draw in (Draw(0.0), Draw(1.0, top_k=2), Draw(1.0, top_p=0.3)):
            _, frames = run(noise, Reverse(draw), [[None] * 8] * 20)
            assert (frames[-1].tokens_BT < 5).all()


SETTLING = [("uniform", Refine()), ("semantic", Reverse()), ("hybrid", Reverse()), ("hybrid", ChangeWorst(3))]


def stops(frames: list[Frame], quiet: int) -> list[int]:
    """The frame at which each row would stop, by the frames of a run that did not."""
    stop = []
    for b in range(len(frames[0].tokens_BT)):
        texts = [frame.tokens_BT[b] for frame in frames]
        still = [torch.equal(a, c) for a, c in itertools.pairwise(texts)]
        ends = (k for k in range(quiet, len(texts)) if all(still[k - quiet : k]) and (texts[k] != TINY.mask_id).all())
        stop.append(next(ends, len(texts) - 1))
    return stop


@pytest.mark.parametrize("quiet", [1, 3])
@pytest.mark.parametrize(("name", "rule"), SETTLING)
def test_until_settled_is_the_full_run_cut_short(name: str, rule: Rule, quiet: int) -> None:
    """Row by row, whichever step it leaves at, and never with a mask in the text."""
    noise, steps, rows = noise_of(name), 25, 100
    full, early = sample(noise, rule, steps, rows=rows), sample(noise, rule, steps, rows=rows, until_settled=quiet)
    stop = stops(full, quiet)
    for k, frame in enumerate(early):
        for b in range(rows):
            assert torch.equal(frame.tokens_BT[b], full[min(k, stop[b])].tokens_BT[b]), (k, b)
            assert bool(frame.settled_BT[b].all()) == (k >= stop[b])
    last = early[-1]
    assert len(early) - 1 == max(stop) == last.forwards
    assert last.saved_B is not None
    assert last.doubt_B is not None
    assert last.saved_B.tolist() == [steps - k for k in stop]
    assert int(last.saved_B.max()) > 2
    assert len(set(stop)) > 3
    assert (last.tokens_BT != TINY.mask_id).all()
    times_B = 1 - (torch.tensor(stop, dtype=torch.float64) - 1) / steps
    law_BTV = bayes(noise, "posterior")(last.tokens_BT, times_B).exp()
    doubt_B = (1 - law_BTV.gather(-1, last.tokens_BT[..., None]).squeeze(-1)).sum(-1)
    expected_B = torch.where(last.saved_B > 0, doubt_B, 0.0)
    assert torch.allclose(last.doubt_B, expected_B, atol=1e-9)
    assert float(expected_B.max()) > 0.1
    assert full[-1].saved_B is None
    assert full[-1].doubt_B is None


def test_expected_edits_are_of_the_free_positions() -> None:
    """A given token of a hybrid is impossible at t = 1, and its own business at any t."""
    given = (None, 1, None)
    noise = noise_of("hybrid")
    last = sample(noise, Refine(), 25, given, rows=200, until_settled=1)[-1]
    assert last.saved_B is not None
    assert last.doubt_B is not None
    law_BTV = bayes(noise, "posterior")(last.tokens_BT, (last.saved_B + 1) / 25).exp()
    doubt_BT = 1 - law_BTV.gather(-1, last.tokens_BT[..., None]).squeeze(-1)
    assert torch.allclose(last.doubt_B, torch.where(last.saved_B > 0, doubt_BT[:, 0] + doubt_BT[:, 2], 0.0), atol=1e-9)
    assert (last.doubt_B > 0).any()


def test_every_window_settles_by_itself() -> None:
    def sure(z_BQ: Tensor, t_B: Tensor | None = None, **_: object) -> Tensor:
        return 50.0 * torch.nn.functional.one_hot(torch.arange(8) % 5, 6).expand(len(z_BQ), -1, -1)

    noise, steps = noise_of("uniform", vocab=5), 12
    sampler = DiffusionSampler(sure, noise, 8, Refine(), steps, 2, until_settled=2)
    *_, last = sampler.steps(Canvas.from_rows([[None] * 20], fill=5), rng=generators(0, 1))
    assert last.saved_B is not None
    assert last.saved_B.tolist() == [3 * (steps - 3)]
    assert last.forwards == 3 * 3
    assert last.tokens_BT[0].tolist() == [i % 5 for i in [*range(8), *range(2, 8), *range(2, 8)]]


def run(noise: Any, rule: Rule, rows: list[list[int | None]], seed: int = 0, **options: Any) -> tuple[Noted, list[Frame]]:
    """A run of windows of 8 with a denoiser that reads all of them."""
    denoiser, options = Noted(5, 8), {"budget": 6} | options
    sampler = DiffusionSampler(denoiser, noise, 8, rule, **options)
    rng = [torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
    return denoiser, list(sampler.steps(Canvas.from_rows(rows, fill=5), rng=rng))


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_on_any_canvas_given_tokens_stay_and_settled_is_a_promise(name: str, rule: str) -> None:
    rows: list[list[int | None]] = [[None] * 21, [1, None, 2, None, None, 3, 4] * 2, [3] * 12 + [None] * 4, [None, 0]]
    canvas = Canvas.from_rows(rows, fill=5)
    for context in (0, 3) if name == "hybrid" else (2,):
        denoiser, frames = run(noise_of(name, vocab=5), RULES[rule], rows, context=context)
        starts = name != "masked"
        assert [frame.forwards for frame in frames] == list(range(1 - starts, len(frames) + 1 - starts))
        assert len(denoiser.seen) == frames[-1].forwards == 6 * -(-(21 - context) // (8 - context))  # as long as the longest row
        for frame, after in zip(frames, [*frames[1:], frames[-1]], strict=True):
            assert torch.equal(frame.tokens_BT[~canvas.free_BT], canvas.tokens_BT[~canvas.free_BT])
            assert torch.equal(frame.tokens_BT[frame.settled_BT], after.tokens_BT[frame.settled_BT])
            assert (frame.settled_BT <= after.settled_BT).all()
            assert frame.settled_BT[~canvas.free_BT].all()
        assert frames[-1].settled_BT.all()
        assert (frames[-1].tokens_BT[canvas.valid_BT] < 5).all()
        assert frames[-1].t_B.tolist() == [0, 0, 0, 0]
        changes_BT = sum((a.tokens_BT != b.tokens_BT).int() for a, b in itertools.pairwise(frames))
        assert isinstance(changes_BT, Tensor)
        assert int(changes_BT.max()) > 1


def test_what_lies_past_the_text_is_denoised_with_it_and_masks_there_stay() -> None:
    for name, rule in (("uniform", Reverse()), ("semantic", Refine()), ("masked", PredictorCorrector())):
        denoiser, frames = run(noise_of(name, vocab=5), rule, [[None] * 3], budget=8)
        past = torch.stack([z_1T[0, 3:] for z_1T, _ in denoiser.seen])
        changed = (past[1:] != past[:-1]).any(-1)
        assert bool(changed.any()) == (name != "masked")
        assert (past == 5).all() or name != "masked"
        assert frames[-1].tokens_BT.shape == (1, 3)


@pytest.mark.parametrize(("name", "rule"), FEWER)
def test_a_row_is_the_same_alone_and_among_longer_ones(name: str, rule: str) -> None:
    rows: list[list[int | None]] = [[None] * 21, [1, None, None], [None, 3, None, 4] * 4, [None], [*[2] * 11, None]]
    noise = noise_of(name, vocab=5)
    for k, options in enumerate(({"context": 3, "until_settled": 2}, {})):
        frames = run(noise, RULES[rule], rows[k:], seed=k, budget=4, **options)[1]
        for b, row in enumerate(rows[k:]):
            alone = run(noise, RULES[rule], [row], seed=k + b, budget=4, **options)[1]
            for n, frame in enumerate(frames):
                single = alone[min(n, len(alone) - 1)]
                assert torch.equal(frame.tokens_BT[b, : len(row)], single.tokens_BT[0]), (b, n)
                assert torch.equal(frame.settled_BT[b, : len(row)], single.settled_BT[0])


@pytest.mark.parametrize("schedule", ["linear", "log-linear:0.3"])
@pytest.mark.parametrize("name", REPLACING)
def test_a_run_starts_from_the_prior_which_a_trajectory_takes_as_its_start(name: str, schedule: str) -> None:
    noise, given = noise_of(name, schedule), (None, 1, None)
    frames, canvas = sample(noise, Reverse(), 2, given), copies(given, TINY.mask_id, ROWS)
    first = frames[0]
    assert first.forwards == 0
    assert (first.t_B == 1).all()
    assert torch.equal(first.settled_BT, ~canvas.free_BT)
    counts_V = torch.bincount(first.tokens_BT[canvas.free_BT], minlength=4).double()
    assert torch.allclose(counts_V / counts_V.sum(), prior_of(noise), atol=0.03)
    assert not counts_V[prior_of(noise) == 0].any()
    trajectory = Trajectory(torch.where(canvas.free_BT, TINY.mask_id, canvas.tokens_BT), canvas, pieces={}, mask_id=TINY.mask_id)
    for frame in frames:
        trajectory.append(frame)
    assert len(trajectory) == 3
    assert trajectory.forwards == [0, 1, 2]
    for kept, frame in zip(trajectory.frames(), frames, strict=True):
        assert torch.equal(kept.tokens_BT, frame.tokens_BT)
        assert torch.equal(kept.settled_BT, frame.settled_BT)


def test_words_become_rules() -> None:
    draw, noise = Draw(0.5), noise_of("uniform")
    rules = {
        "ancestral": Reverse(draw),
        "predictor-corrector": PredictorCorrector(1.0, draw),
        "predictor-corrector:0.3": PredictorCorrector(0.3, draw),
        "refine": Refine(draw),
        "entropy-bound": EntropyBound(0.1, draw),
        "entropy-bound:0.4": EntropyBound(0.4, draw),
        "worst": ChangeWorst(2.0, draw),
        "worst:1.5": ChangeWorst(1.5, draw),
    }
    for name in REPLACING:
        assert {word: registry.make(word, draw, noise_of(name)) for word in rules} == rules
    assert registry.make("refine", draw, noise, 3) == GreedyTail(Refine(draw), 3)
    assert registry.make("predictor-corrector:0.5", draw, noise_of("masked")) == PredictorCorrector(0.5, draw)


@pytest.mark.parametrize(
    ("word", "name", "message"),
    [
        (
            "topk",
            "uniform",
            "'topk' needs masked noise; this model has replacement noise and can use: ancestral, pred",
        ),
        ("confidence:0.7", "hybrid", "'confidence' needs masked noise"),
        ("refine", "masked", "'refine' needs replacement noise; this model has masked noise and can use: ancestral, first-hitting"),
        ("worst:2", "masked", "'worst' needs replacement noise"),
        ("magic", "masked", "'magic' is unknown; .* can use: ancestral, first-hitting, topk, .*planner, speculative"),
        ("magic:3", "semantic", "'magic' is unknown; .* can use: ancestral, predictor-corrector, refine, entropy-bound, worst"),
        ("ancestral:3", "masked", "'ancestral' has no setting, got 'ancestral:3'"),
        ("refine:3", "uniform", "'refine' has no setting"),
        ("worst:many", "uniform", "'worst:many': 'many' is no number"),
        ("confidence:", "masked", "'' is no number"),
        ("confidence:2", "masked", "threshold must be above 0 and at most 1, got 2.0"),
        ("confidence:0", "masked", "threshold must be above 0 and at most 1"),
        ("predictor-corrector:-1", "masked", "corrector must be at least 0 and at most 1e.09, got -1.0"),
        ("predictor-corrector:inf", "uniform", "corrector must be at least 0 and at most 1e.09, got inf"),
        ("entropy-bound:nan", "uniform", "bound must be at least 0 and at most 1e.09, got nan"),
        ("worst:0", "hybrid", "must be above 0 and at most 1e.09, got 0.0"),
    ],
)
def test_words_that_cannot_be_are_told(word: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        registry.make(word, Draw(), noise_of(name))
    assert "\n" not in str(error.value)


def test_what_does_not_revise_has_no_tail_and_does_not_settle() -> None:
    with pytest.raises(InputError, match="a greedy tail revises tokens, which masked noise does not"):
        registry.make("ancestral", Draw(), noise_of("masked"), 1)
    with pytest.raises(InputError, match=r"the greedy tail in steps must be at least 1 and at most 1e.09, got -1"):
        registry.make("ancestral", Draw(), noise_of("uniform"), -1)
    for rule in (Ancestral(), Threshold()):
        with pytest.raises(InputError, match="needs a sampler that revises"):
            DiffusionSampler(Noted(5, 8), noise_of("masked", vocab=5), 8, rule, until_settled=1)
    with pytest.raises(InputError, match="until_settled, in steps, must be at least 0"):
        DiffusionSampler(Noted(5, 8), noise_of("uniform", vocab=5), 8, Reverse(), until_settled=-1)
