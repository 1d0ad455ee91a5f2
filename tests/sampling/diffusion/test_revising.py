"""Rules that may change a token again: their laws enumerated with transition matrices.

Shapes: B rows, T positions, V vocabulary, S = V^T sequences, Z = (V + 1)^T states of the chain, the mask included.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from chains import HOLE, REPLACING, ROWS, TINY, Z_ZT, Given, bayes, distance, hot, law, noise_of, prior_of, sample
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.diffusion.revising import ChangeWorst, EntropyBound, GreedyTail, PredictorCorrector, Refine, Reverse
from dlm.sampling.draw import Draw, categorical, generators, uniform
from dlm.trajectory import Frame
from oracle import chi_square_of_counts, chi_square_p, dense, dense_move


def back(noise: Any, mu_ZTV: Tensor, t: float, s: float, left: int = 0) -> Tensor:
    """p(z_s | z_t) with mu in place of x, and p(x | z) for s = 0; states that cannot be get 0."""
    into_ZTV = (dense_move(noise, s, t) if s > 0 else dense(noise, t))[:, Z_ZT].permute(1, 2, 0)
    joint_ZTV = into_ZTV.clamp(min=0) * (mu_ZTV @ dense(noise, s) if s > 0 else mu_ZTV)
    return (joint_ZTV / joint_ZTV.sum(-1, keepdim=True)).nan_to_num()


def corrected(corrector: float, noise: Any, mu_ZTV: Tensor, t: float, s: float, left: int) -> Tensor:
    below = max(0.0, s - corrector * (t - s))
    law_ZTV = back(noise, mu_ZTV, t, below)
    return law_ZTV @ dense_move(noise, below, s) if s > 0 else law_ZTV


def refined(noise: Any, mu_ZTV: Tensor, t: float, s: float, left: int) -> Tensor:
    return back(noise, mu_ZTV, t, 0.0)


def histogram(frames: list[Frame]) -> Tensor:
    return torch.bincount(TINY.index(frames[-1].tokens_BT), minlength=len(TINY.p_S)).double() / len(frames[-1].tokens_BT)


@pytest.mark.parametrize(("steps", "schedule"), [(1, "linear"), (2, "linear"), (5, "linear"), (3, "cosine"), (3, "log-linear:0.2")])
@pytest.mark.parametrize("name", REPLACING)
def test_reverse_draws_the_law_of_its_chain(name: str, steps: int, schedule: str) -> None:
    noise = noise_of(name, schedule)
    assert chi_square_p(sample(noise, Reverse(), steps)[-1].tokens_BT, law(noise, steps, back), TINY) > 1e-3


@pytest.mark.slow
def test_the_test_of_the_law_can_fail() -> None:
    samples = sample(noise_of("uniform"), Reverse(), 2)[-1].tokens_BT
    for name, steps, move in (("uniform", 1, back), ("uniform", 5, back), ("uniform", 2, refined)):
        assert chi_square_p(samples, law(noise_of(name), steps, move), TINY) < 1e-3, (name, steps)


@pytest.mark.parametrize("name", REPLACING)
def test_the_distance_to_the_data_falls_with_the_steps(name: str) -> None:
    distances = [distance(law(noise_of(name), steps, back), TINY) for steps in (1, 2, 4, 8, 16, 64)]
    assert all(a > b for a, b in itertools.pairwise(distances)), distances
    assert distances[0] > 0.1
    # the uniform part of GIDD's noise grows as the root of t, so that the last of equal steps is a long one
    assert distances[-1] < (0.15 if name == "gidd" else 0.05) * distances[0]
    measured = [distance(histogram(sample(noise_of(name), Reverse(), steps)), TINY) for steps in (1, 8)]
    assert measured[0] > measured[1]


@pytest.mark.parametrize("given", [(1, None, None), (None, 2, 0)])
@pytest.mark.parametrize("name", REPLACING)
def test_given_tokens_condition_the_rest(name: str, given: Given) -> None:
    noise = noise_of(name, "cosine")
    samples = sample(noise, Reverse(), 3, given)[-1].tokens_BT
    assert all((samples[:, i] == x).all() for i, x in enumerate(given) if x is not None)
    assert chi_square_p(samples, law(noise, 3, back, given), TINY) > 1e-3


def test_temperature_is_of_the_guess() -> None:
    def sharper(mu_ZTV: Tensor) -> Tensor:
        return mu_ZTV**2 / (mu_ZTV**2).sum(-1, keepdim=True)

    for temperature, shape in ((0.5, sharper), (0.0, lambda mu_ZTV: hot(mu_ZTV.argmax(-1)))):
        noise, draw = noise_of("uniform"), Draw(temperature)
        samples, law_S = sample(noise, Reverse(draw), 4)[-1].tokens_BT, law(noise, 4, back, shape=shape)
        assert chi_square_p(samples, law_S, TINY) > 1e-3
        assert chi_square_p(samples, law(noise, 4, back), TINY) < 1e-3
    logp_BTV = torch.tensor([[[0.2, 0.5, 0.3, 0.0], [0.0, 0.1, 0.4, 0.5]]]).log()
    assert Draw(0.0).shape(logp_BTV).tolist() == [[[-math.inf, 0, -math.inf, -math.inf], [-math.inf] * 3 + [0]]]


@pytest.mark.parametrize(("corrector", "steps"), [(0.5, 4), (3.0, 3)])
@pytest.mark.parametrize("name", ["masked", "uniform", "hybrid"])
def test_predictor_corrector_draws_its_law(name: str, corrector: float, steps: int) -> None:
    """Down to s - c (t - s), at most to 0, then up to s with forward noise."""
    noise = noise_of(name)
    law_S = law(noise, steps, partial(corrected, corrector))
    assert chi_square_p(sample(noise, PredictorCorrector(corrector), steps)[-1].tokens_BT, law_S, TINY) > 1e-3


@pytest.mark.parametrize("corrector", [0.5, 3.0])
@pytest.mark.parametrize("name", ["masked", *REPLACING])
def test_one_move_of_predictor_corrector(name: str, corrector: float) -> None:
    """From one state, over all states that may follow: the marginals at the end say little about what happened on the way."""
    noise, t, s = noise_of(name), 0.75, 0.5
    for z_T in (torch.tensor([0, 1, 1]), torch.tensor([2, 3, 3] if name in ("masked", "hybrid") else [2, 0, 2])):
        state, z_BT, t_B = int((z_T == Z_ZT).all(-1).nonzero()), z_T.expand(ROWS, -1), torch.full((ROWS,), t, dtype=torch.float64)
        logp_ZTV = noise.log_probs(bayes(noise)(Z_ZT, t_B[:64]), Z_ZT, t_B[:64])
        logp_BTV = logp_ZTV[state].expand(ROWS, -1, -1)
        step = Step(z_BT, torch.ones_like(z_BT, dtype=torch.bool), logp_BTV, t_B, t_B - t + s, torch.full((ROWS,), 2), 4, noise)
        after_BT = PredictorCorrector(corrector)(step, generators(0, ROWS))
        counts_Z = torch.bincount((after_BT * torch.tensor([16, 4, 1])).sum(-1), minlength=64)
        for move, right in ((partial(corrected, corrector), True), (back, False), (partial(corrected, 0.2), False)):
            next_TV = move(noise, logp_ZTV.exp(), t, s, 2)[state]
            chance_Z = next_TV[torch.arange(3), Z_ZT].prod(-1)
            assert (chi_square_of_counts(counts_Z, chance_Z) > 1e-3) == right, (z_T, move)


def step_of(noise: Any, rows: int = 300, length: int = 6, t: float = 0.7, s: float = 0.5, left: int = 3, steps: int = 5) -> Step:
    """A step in the middle of a run, the first position given, with a guess at random."""
    rng = torch.Generator().manual_seed(1)
    t_B, s_B = (torch.full((rows,), x, dtype=torch.float64) for x in (t, s))
    z_BT = noise.corrupt(torch.randint(noise.vocab_size - 1, (rows, length), generator=rng), t_B, rng)
    open_BT = torch.ones_like(z_BT, dtype=torch.bool)
    open_BT[:, 0] = False
    logp_BTV = noise.log_probs(2 * torch.randn(rows, length, noise.vocab_size, dtype=torch.float64, generator=rng), z_BT, t_B)
    return Step(z_BT, open_BT, logp_BTV, t_B, s_B, torch.full((rows,), left), steps, noise)


@pytest.mark.parametrize("name", ["masked", *REPLACING])
def test_no_corrector_is_the_reverse_chain_token_for_token(name: str) -> None:
    for t, s in ((1.0, 0.75), (0.7, 0.5), (0.25, 0.0)):
        step = step_of(noise_of(name, vocab=5), t=t, s=s)
        plain, none, some = (rule(step, generators(0, 300)) for rule in (Reverse(), PredictorCorrector(0.0), PredictorCorrector(0.9)))
        assert torch.equal(plain, none)
        assert not torch.equal(plain, step.z_BT)
        assert torch.equal(plain, some) == (s == 0)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", REPLACING)
def test_refine_draws_its_law(name: str, steps: int) -> None:
    noise = noise_of(name)
    assert chi_square_p(sample(noise, Refine(), steps)[-1].tokens_BT, law(noise, steps, refined), TINY) > 1e-3


def explained(noise: Any, mu_ZTV: Tensor, t: float, z_ZT: Tensor = Z_ZT, open_ZT: Tensor | None = None) -> Tensor:
    """p(x | z) at the level whose share of noise is the share of tokens expected to be wrong, after eight rounds from t on."""
    open_ZT = torch.ones_like(z_ZT, dtype=torch.bool) if open_ZT is None else open_ZT
    t_Z = torch.full((len(z_ZT),), t, dtype=torch.float64)
    for _ in range(8):
        fits_ZTV = dense(noise, t_Z)[torch.arange(len(z_ZT))[:, None], :, z_ZT]
        law_ZTV = mu_ZTV * fits_ZTV / (mu_ZTV * fits_ZTV).sum(-1, keepdim=True)
        wrong_ZT = torch.where(open_ZT, 1 - law_ZTV.gather(-1, z_ZT[..., None]).squeeze(-1), 0.0)
        t_Z = noise.schedule.inverse(1 - (wrong_ZT.sum(-1) / open_ZT.sum(-1)).clamp(1e-3, 1 - 1e-3))
    return law_ZTV


def surest(law_ZTV: Tensor, open_ZT: Tensor, bound: float) -> Tensor:
    """bool (Z, T): positions of least entropy, one by one, while all but the largest of them sum to at most the bound."""
    entropy_ZT, keep_ZT = torch.special.entr(law_ZTV).sum(-1), torch.zeros_like(open_ZT)
    for z, (entropy_T, open_T) in enumerate(zip(entropy_ZT.tolist(), open_ZT.tolist(), strict=True)):
        kept: list[float] = []
        for i in sorted((i for i, free in enumerate(open_T) if free), key=lambda i: entropy_T[i]):
            if sum([*kept, entropy_T[i]]) - max([*kept, entropy_T[i]]) > bound:
                break
            kept.append(entropy_T[i])
            keep_ZT[z, i] = True
    return keep_ZT


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("name", REPLACING)
def test_entropy_bound_keeps_what_the_bound_allows_and_the_rest_is_prior_noise(name: str, bound: float) -> None:
    noise = noise_of(name, vocab=5)
    for left in (3, 1):
        step = step_of(noise, left=left)
        after_BT = EntropyBound(bound)(step, generators(0, 300))
        law_BTV = explained(noise, step.logp_BTV.exp(), 0.7, step.z_BT, step.open_BT)
        keep_BT = surest(law_BTV, step.open_BT, bound) if left > 1 else step.open_BT
        rng = generators(0, 300)
        drawn_BT, noise_BT = categorical(law_BTV.log(), uniform(rng, 6)), noise.prior(uniform(rng, 6))
        assert torch.equal(after_BT, torch.where(step.open_BT, torch.where(keep_BT, drawn_BT, noise_BT), step.z_BT))
        count_B = keep_BT.sum(-1)
        if left == 1 or bound == 100.0:
            assert (count_B == 5).all()
        elif bound == 0:
            assert (count_B == 1).all()
        else:
            assert count_B.min() < count_B.max()


@pytest.mark.parametrize(
    ("bound", "steps", "given"), [(0.0, 3, HOLE), (0.6, 3, HOLE), (0.6, 1, (1, None, None)), (0.6, 3, (1, None, None))]
)
@pytest.mark.parametrize("name", ["uniform", "hybrid"])
def test_entropy_bound_draws_its_law(name: str, bound: float, steps: int, given: Given) -> None:
    """Given tokens, which a hybrid cannot have at t = 1, tell nothing about the level."""
    open_ZT = torch.tensor([x is None for x in given]).expand_as(Z_ZT)

    def move(noise: Any, mu_ZTV: Tensor, t: float, s: float, left: int) -> Tensor:
        law_ZTV = explained(noise, mu_ZTV, t, open_ZT=open_ZT)
        keep_ZT = surest(law_ZTV, open_ZT, bound if left > 1 else math.inf)
        return torch.where(keep_ZT[..., None], law_ZTV, prior_of(noise)).nan_to_num()

    noise = noise_of(name)
    samples = sample(noise, EntropyBound(bound), steps, given)[-1].tokens_BT
    assert (samples < TINY.mask_id).all()
    assert chi_square_p(samples, law(noise, steps, move, given), TINY) > 1e-3


def worst_of(mu_ZTV: Tensor, z_ZT: Tensor, open_ZT: Tensor, edits: float, steps: int, left: int, mask_id: int) -> Tensor:
    """bool (Z, T): the positions that are drawn anew, counted out one row at a time."""
    worst_ZT = torch.zeros_like(open_ZT)
    for z, (mu_TV, z_T, open_T) in enumerate(zip(mu_ZTV.tolist(), z_ZT.tolist(), open_ZT.tolist(), strict=True)):
        score = {i: max(mu) - mu[token] + (token == mask_id) for i, (mu, token) in enumerate(zip(mu_TV, z_T, strict=True)) if open_T[i]}
        count, masks = math.ceil(edits * len(score) / steps), sum(z_T[i] == mask_id for i in score)
        count = max(count, masks) if left == 1 else count
        worst_ZT[z, sorted((i for i in score if score[i] > 0), key=lambda i: -score[i])[:count]] = True
    return worst_ZT


@pytest.mark.parametrize("edits", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("name", REPLACING)
def test_change_worst_changes_only_what_gains_and_no_more_than_it_may(name: str, edits: float) -> None:
    noise = noise_of(name, vocab=5)
    for left in (3, 1):
        step = step_of(noise, left=left, steps=5)
        after_BT, mu_BTV = ChangeWorst(edits)(step, generators(0, 300)), step.logp_BTV.exp()
        worst_BT = worst_of(mu_BTV, step.z_BT, step.open_BT, edits, 5, left, 5)
        drawn_BT = categorical(step.logp_BTV, uniform(generators(0, 300), 6))
        assert torch.equal(after_BT, torch.where(worst_BT, drawn_BT, step.z_BT))
        changed_BT, best_BT = after_BT != step.z_BT, mu_BTV.argmax(-1)
        assert changed_BT.any()
        assert not (changed_BT & (best_BT == step.z_BT)).any()
        if left > 1:
            assert (changed_BT.sum(-1) <= math.ceil(edits * 5 / 5)).all()
        else:
            assert not ((after_BT == 5) & step.open_BT).any()


@pytest.mark.parametrize("edits", [0.5, 2.0])
@pytest.mark.parametrize("name", ["uniform", "hybrid"])
def test_change_worst_draws_its_law(name: str, edits: float) -> None:
    def move(noise: Any, mu_ZTV: Tensor, t: float, s: float, left: int) -> Tensor:
        worst_ZT = worst_of(mu_ZTV, Z_ZT, torch.ones_like(Z_ZT, dtype=torch.bool), edits, 4, left, TINY.mask_id)
        return torch.where(worst_ZT[..., None], mu_ZTV, hot(Z_ZT))

    noise = noise_of(name)
    assert chi_square_p(sample(noise, ChangeWorst(edits), 4)[-1].tokens_BT, law(noise, 4, move), TINY) > 1e-3


@pytest.mark.parametrize("name", REPLACING)
def test_a_greedy_tail_ends_with_the_likeliest_tokens(name: str) -> None:
    def move(noise: Any, mu_ZTV: Tensor, t: float, s: float, left: int) -> Tensor:
        return hot(back(noise, mu_ZTV, t, 0.0).argmax(-1)) if left <= 2 else back(noise, mu_ZTV, t, s)

    noise = noise_of(name)
    frames = sample(noise, GreedyTail(Reverse(), 2), 5)
    assert chi_square_p(frames[-1].tokens_BT, law(noise, 5, move), TINY) > 1e-3
    for k in (4, 5):  # frame 0 is the start
        times_B = torch.full((ROWS,), 1 - (k - 1) / 5, dtype=torch.float64)
        best_BT = bayes(noise, "posterior")(frames[k - 1].tokens_BT, times_B).argmax(-1)
        assert torch.equal(frames[k].tokens_BT, best_BT)
    assert not torch.equal(frames[5].tokens_BT, frames[3].tokens_BT)
    plain = sample(noise, Reverse(), 5)
    assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(frames[:4], plain, strict=False))
