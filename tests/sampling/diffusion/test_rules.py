"""MATHS.md 5.5: what each rule draws, against its law enumerated state by state with the Bayes denoiser.

Shapes: B rows, T positions, V vocabulary, S = V^T sequences, Z = (V + 1)^T states of the chain, the mask included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from chains import Guess, ancestral_law, chosen_law, copies, distance, masked_noise
from chains import unmask as sample
from dlm.errors import InputError
from dlm.noise import schedule
from dlm.noise.masked import MaskedNoise
from dlm.sampling import registry
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import Rule
from dlm.sampling.diffusion.unmasking import Ancestral, Threshold, TopScore
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame
from oracle import Noted, Tiny, chi_square_p, total_variation

ROWS = 4000
TINY = Tiny(3, 3, seed=0)
RULES: dict[str, Rule] = {
    "ancestral": Ancestral(),
    "topk": TopScore(),
    "confidence": Threshold(0.7),
    "certain": Threshold(1.0),
    "any": Threshold(1e-9),
    "greedy": TopScore(Draw(0.0)),
    "warm": Ancestral(Draw(1.5, top_p=0.9)),
}


@pytest.mark.parametrize("word", ["linear", "cosine", "log-linear:0.2"])
@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_ancestral_draws_the_law_of_its_chain(steps: int, word: str) -> None:
    assert chi_square_p(sample(TINY, Ancestral(), steps, word=word), ancestral_law(TINY, steps, word), TINY) > 1e-3


@pytest.mark.parametrize("word", ["linear", "cosine", "polynomial:3", "log-linear:0.2", "geometric:0.01,3"])
def test_masks_are_revealed_when_the_chain_says(word: str) -> None:
    """In the step t -> s with (alpha_s - alpha_t) / (1 - alpha_t), and what the schedule leaves over in the last one."""
    rows, steps, noise = 1500, 5, MaskedNoise(6, 5, schedule.parse(word))
    denoiser = Noted(5, 12)
    frames = DiffusionSampler(denoiser, noise, 12, Ancestral(), steps).steps(copies([None] * 12, 5, rows), rng=generators(0, rows))
    before_BT, count_N = torch.full((rows, 12), 5), torch.zeros(steps, dtype=torch.float64)
    for frame in frames:
        busy_B = (before_BT == 5).any(-1)
        step_B = ((1 - denoiser.seen[-1][1]) * steps).round().long()
        count_N += torch.bincount(step_B, (frame.tokens_BT != before_BT)[busy_B].sum(-1).double(), minlength=steps)
        before_BT = frame.tokens_BT
    alphas = noise.schedule.alpha(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    left = torch.cat([((1 - alphas[1:-1]) / (1 - alphas[0])), torch.zeros(1)])
    expected_N = (torch.cat([torch.ones(1), left[:-1]]) - left) * rows * 12
    statistic = ((count_N - expected_N) ** 2 / expected_N).sum()
    assert float(torch.special.gammaincc(torch.tensor((steps - 1) / 2), statistic / 2)) > 1e-3


@pytest.mark.slow
def test_the_test_of_the_law_can_fail() -> None:
    """Its power: one wrong step count, schedule or end point is noticed."""
    samples = sample(TINY, Ancestral(), 2)
    assert chi_square_p(samples, ancestral_law(TINY, 1), TINY) < 1e-6
    assert chi_square_p(samples, ancestral_law(TINY, 4), TINY) < 1e-6
    assert chi_square_p(samples, ancestral_law(TINY, 2, "cosine"), TINY) < 1e-3


def test_ancestral_at_many_steps_draws_the_data() -> None:
    """Each row is called at most once a token, so steps without end cost nothing."""
    for seed, shape in ((0, (3, 3)), (1, (2, 4)), (2, (4, 2))):
        tiny = Tiny(*shape, seed=seed)
        samples = sample(tiny, Ancestral(), 100_000)
        assert chi_square_p(samples, tiny.p_S, tiny) > 1e-3
        assert total_variation(samples, tiny) < 0.04


def test_the_distance_to_the_data_falls_with_the_steps() -> None:
    for word in ("linear", "cosine"):
        distances = [distance(ancestral_law(TINY, steps, word), TINY) for steps in (1, 2, 4, 8, 16, 64, 256)]
        assert all(a > b for a, b in itertools.pairwise(distances)), (word, distances)
        assert distances[0] > 0.1
        assert distances[-1] < 0.01 * distances[0] + 1e-3
    measured = [total_variation(sample(TINY, Ancestral(), steps), TINY) for steps in (1, 4, 64)]
    assert measured[0] > measured[1] > measured[2]


@pytest.mark.parametrize("given", [(1, None, None), (None, 2, None), (None, None, 0), (None, 1, 2), (2, None, 1)])
def test_given_tokens_condition_the_rest(given: tuple[int | None, ...]) -> None:
    fits_S = torch.stack([TINY.x_ST[:, i] == x for i, x in enumerate(given) if x is not None]).all(0)
    conditional_S = TINY.p_S * fits_S / (TINY.p_S * fits_S).sum()
    samples = sample(TINY, Ancestral(), 100_000, given=given, rows=3000)
    assert fits_S[TINY.index(samples)].all()
    assert chi_square_p(samples, conditional_S, TINY) > 1e-3
    assert chi_square_p(sample(TINY, Ancestral(), 2, given=given, rows=3000), ancestral_law(TINY, 2, given=given), TINY) > 1e-3


def most_confident(masked: list[int], mu: Guess, drawn: dict[int, int], left: int, last: Guess | None) -> list[int]:
    order = sorted(masked, key=lambda i: -mu[i][drawn[i]])
    return order[: -(-len(masked) // left)]


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_top_confidence_draws_its_law_which_is_not_the_data(steps: int, record_property: Callable[[str, object], None]) -> None:
    law_S = chosen_law(TINY, steps, most_confident)
    samples = sample(TINY, TopScore(), steps)
    assert chi_square_p(samples, law_S, TINY) > 1e-3
    record_property("total_variation", total_variation(samples, TINY))
    if steps >= TINY.length:  # one token a step: the exact sampler is exact here, this one keeps what it happens to be sure of
        assert distance(law_S, TINY) > 0.03 > 10 * distance(ancestral_law(TINY, 256), TINY)
        assert chi_square_p(samples, TINY.p_S, TINY) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("threshold", [1e-9, 0.5, 0.7, 1.0])
def test_threshold_draws_its_law(threshold: float, steps: int) -> None:
    def sure(masked: list[int], mu: Guess, drawn: dict[int, int], left: int, last: Guess | None) -> list[int]:
        top = {i: max(mu[i]) for i in masked}
        count = max(sum(p >= threshold for p in top.values()), -(-len(masked) // left))
        return sorted(masked, key=lambda i: -top[i])[:count]

    law_S = chosen_law(TINY, steps, sure)
    assert chi_square_p(sample(TINY, Threshold(threshold), steps), law_S, TINY) > 1e-3
    if threshold == 1.0 and steps == 8:  # one token a step, in an order that does not look at what is drawn: exact
        assert distance(law_S, TINY) < 1e-9
    if threshold == 1e-9:  # everything in one step: the product of the marginals
        assert distance(law_S, TINY) == pytest.approx(distance(ancestral_law(TINY, 1), TINY))


def run(rule: Rule, steps: int, rows: list[list[int | None]], seed: int = 0, window: int = 12) -> tuple[Noted, list[Frame]]:
    denoiser = Noted(5, window)
    sampler = DiffusionSampler(denoiser, MaskedNoise(6, 5), window, rule, steps, model="noted")
    return denoiser, list(sampler.steps(Canvas.from_rows(rows, fill=5), rng=generators(seed, len(rows))))


@pytest.mark.parametrize("steps", [1, 3, 5, 12, 30])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_fills_the_canvas_within_its_steps(name: str, steps: int) -> None:
    rows: list[list[int | None]] = [[None] * 12, [1, None, 2] * 4, [3] * 11 + [None]]
    denoiser, frames = run(RULES[name], steps, rows)
    free = [12, 4, 1]
    assert len(frames) == len(denoiser.seen) == frames[-1].forwards <= min(steps, 12)
    assert [frame.forwards for frame in frames] == list(range(1, len(frames) + 1))
    before_BT = torch.tensor([[5 if x is None else x for x in row] for row in rows])
    level_B = torch.ones(3, dtype=torch.float64)
    moves_B = torch.zeros(3, dtype=torch.long)
    for frame, (seen_AT, t_A) in zip(frames, denoiser.seen, strict=True):
        busy_B = (before_BT == 5).any(-1)
        assert torch.equal(seen_AT, before_BT[busy_B])  # the network sees the state itself, of the rows that still move
        assert (t_A <= level_B[busy_B]).all()
        assert (t_A > frame.t_B[busy_B]).all()
        new_BT = frame.tokens_BT != before_BT
        assert (before_BT[new_BT] == 5).all()  # a token once written stays
        assert torch.equal(new_BT.any(-1), busy_B)  # at least one token a call
        assert torch.equal(frame.settled_BT, frame.tokens_BT != 5)
        assert frame.model == "noted"
        moves_B += busy_B
        before_BT, level_B = frame.tokens_BT, frame.t_B
    assert frames[-1].settled_BT.all()
    assert (before_BT < 5).all()
    assert frames[-1].t_B.tolist() == [0, 0, 0]
    assert all(int(moves) <= min(steps, n) for moves, n in zip(moves_B, free, strict=True))


def test_the_number_of_calls_that_each_rule_promises() -> None:
    hole: list[list[int | None]] = [[None] * 12]
    for steps in (1, 3, 5, 12, 30):
        assert len(run(TopScore(), steps, hole)[1]) == min(steps, 12)
        assert len(run(Threshold(1.0), steps, hole)[1]) == min(steps, 12)
        assert len(run(Threshold(1e-9), steps, hole)[1]) == 1
    taken = [(frame.tokens_BT != 5).sum() for frame in run(TopScore(), 5, hole)[1]]
    assert [int(n) for n in taken] == [3, 6, 8, 10, 12]


def test_ancestral_calls_the_network_as_often_as_docs_say() -> None:
    """N (1 - (1 - 1/N)^n) calls a window with the linear schedule."""
    rows, steps = 1500, 8
    _, frames = run(Ancestral(), steps, [[None] * 12] * rows)
    calls_B, before_BT = torch.zeros(rows), torch.full((rows, 12), 5)
    for frame in frames:
        calls_B += (frame.tokens_BT != before_BT).any(-1)
        before_BT = frame.tokens_BT
    expected = steps * (1 - (1 - 1 / steps) ** 12)
    assert float(calls_B.mean()) == pytest.approx(expected, abs=4 * float(calls_B.std()) / rows**0.5)


@pytest.mark.parametrize("name", RULES)
def test_a_batch_costs_as_many_calls_as_its_longest_row(name: str) -> None:
    rows: list[list[int | None]] = [[None] * 12, [1, None, None, 2], [None] * 5]
    denoiser, frames = run(RULES[name], 6, rows)
    alone = [run(RULES[name], 6, [row], seed=i) for i, row in enumerate(rows)]
    assert len(denoiser.seen) == max(len(one.seen) for one, _ in alone)
    for i, (row, (_, its)) in enumerate(zip(rows, alone, strict=True)):
        assert torch.equal(frames[-1].tokens_BT[i, : len(row)], its[-1].tokens_BT[0]), i


def test_temperature_0_is_deterministic_and_likeliest() -> None:
    hole: list[list[int | None]] = [[None] * 12]
    first, second = (run(TopScore(Draw(0.0)), 12, hole, seed=seed)[1] for seed in (0, 1))
    assert torch.equal(first[-1].tokens_BT, second[-1].tokens_BT)
    denoiser, frames = run(Ancestral(Draw(0.0)), 1, hole)
    logits_TV = denoiser(torch.full((1, 12), 5), torch.ones(1))[0, :, :5]
    assert torch.equal(frames[0].tokens_BT[0], logits_TV.argmax(-1))


def test_the_same_seed_gives_the_same_frames_and_another_does_not() -> None:
    for name in ("ancestral", "topk", "confidence", "warm"):
        runs = [run(RULES[name], 6, [[None] * 12] * 3, seed=seed)[1] for seed in (0, 0, 50)]
        assert len(runs[0]) == len(runs[1])
        assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(runs[0], runs[1], strict=True))
        assert not torch.equal(runs[0][-1].tokens_BT, runs[2][-1].tokens_BT)


def test_words_become_rules_and_errors_are_told() -> None:
    draw = Draw(0.5)
    words = ("ancestral", "topk", "confidence", "confidence:0.7")
    made = [registry.make(word, draw, masked_noise(TINY)) for word in words]
    assert made == [Ancestral(draw), TopScore(draw), Threshold(0.9, draw), Threshold(0.7, draw)]
    for wrong in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="threshold"):
            Threshold(wrong)
    noise = MaskedNoise(6, 5)
    with pytest.raises(InputError, match="steps"):
        DiffusionSampler(Noted(5, 4), noise, 4, budget=0)
    for context in (-1, 4):
        with pytest.raises(InputError, match="context"):
            DiffusionSampler(Noted(5, 4), noise, 4, context=context)


def test_a_canvas_without_holes_needs_no_call() -> None:
    denoiser, frames = run(Ancestral(), 4, [[1, 2, 3]])
    assert frames == []
    assert denoiser.seen == []
