"""Noise of classes on enumerated distributions: the bound and its two parts, posteriors, estimators, samplers."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm.noise import loss, process
from dlm.noise.classes import ClassNoise
from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion.constraints import AllowedTokens
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.staged import ClassesFirst, TwoClocks
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame
from oracle import ClassBayes, Tiny, chi_square_p

VOCAB, LENGTH = 4, 2
TINY = Tiny(VOCAB, LENGTH, seed=2)
CLUSTERS = (0, 1, 0, 1)
MASK = VOCAB


def noise_of(lead: float = 2.0, clusters: tuple[int, ...] = CLUSTERS, schedule: str = "linear") -> ClassNoise:
    settings = {"process": "classes", "lead": lead, "clusters": list(clusters), "schedule": schedule}
    made = process.make(settings, VOCAB + 2 + max(clusters), MASK)
    assert isinstance(made, ClassNoise)
    return made


def wrong(noise: ClassNoise, z_BT: Tensor, _t_B: Tensor | None = None) -> Tensor:
    """A guess that depends on what it sees."""
    table_KV = torch.randn(17, noise.vocab_size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return table_KV[((z_BT * torch.tensor([1, 5])).sum(-1, keepdim=True) + torch.tensor([0, 3])) % 17]


def chances(noise: ClassNoise, t: Tensor | float) -> Tensor:
    """Of a word, its class and a mask at these times, from the definition: (..., 3)."""
    near = noise.schedule.alpha(torch.as_tensor(t, dtype=torch.float64))
    far = 1 - (1 - near) ** noise.lead
    return torch.stack([near * far, (1 - near) * far, 1 - far], -1)


KINDS = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))


def enumerated(noise: ClassNoise, predict: Any, nodes: int = 16) -> tuple[float, float]:
    """The two parts of the bound in nats a sequence: all texts and all noise at Gauss-Legendre times t = u^2."""
    points, weights = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(nodes))
    u_N, class_V = (points + 1) / 2, torch.tensor(noise.clusters)
    x_MT, kind_MT = TINY.x_ST.repeat_interleave(len(KINDS), 0), KINDS.repeat(len(TINY.x_ST), 1)
    z_MT = torch.where(kind_MT == 0, x_MT, torch.where(kind_MT == 1, MASK + 1 + class_V[x_MT], MASK))
    chance_NM = chances(noise, u_N**2)[:, kind_MT].prod(-1) * TINY.p_S.repeat_interleave(len(KINDS))
    x, z, t = x_MT.repeat(nodes, 1), z_MT.repeat(nodes, 1), (u_N**2).repeat_interleave(len(x_MT))
    parts = noise.nelbo_parts(noise.log_probs(predict(z, t), z, t), x, z, t)
    mass_NM = (weights / 2 * 2 * u_N)[:, None] * chance_NM
    of_class, of_word = (float((mass_NM * part.sum(-1).view(nodes, -1)).sum()) for part in parts)
    return of_class, of_word


def class_entropy(clusters: tuple[int, ...]) -> float:
    """Nats of the classes of a sequence."""
    mass: dict[tuple[int, ...], float] = {}
    for x, p in zip(TINY.x_ST.tolist(), TINY.p_S.tolist(), strict=True):
        key = tuple(clusters[token] for token in x)
        mass[key] = mass.get(key, 0.0) + p
    return -sum(p * math.log(p) for p in mass.values() if p > 0)


@pytest.mark.parametrize("lead", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("clusters", [CLUSTERS, (0, 0, 1, 2), (0, 1, 2, 3), (0, 0, 0, 0)])
def test_the_exact_posterior_reaches_the_entropy(lead: float, clusters: tuple[int, ...]) -> None:
    noise = noise_of(lead, clusters)
    of_class, of_word = enumerated(noise, ClassBayes(TINY, noise))
    assert of_class + of_word == pytest.approx(TINY.entropy(), abs=1e-8 if lead != 3.5 else 1e-5)
    assert sum(enumerated(noise, partial(wrong, noise))) > TINY.entropy() + 0.1


def test_the_schedule_does_not_matter() -> None:
    one, other = noise_of(2.0), noise_of(2.0, schedule="cosine")
    assert sum(enumerated(other, partial(wrong, one), 64)) == pytest.approx(sum(enumerated(one, partial(wrong, one))), abs=1e-4)


def test_the_parts_are_the_chain_rule() -> None:
    """With words long after their classes H(classes) and H(words | classes); with both at once less of the former: words tell classes."""
    of_class, of_word = enumerated(noise_of(200.0), ClassBayes(TINY, noise_of(200.0)), 400)
    assert of_class == pytest.approx(class_entropy(CLUSTERS), abs=0.01)
    assert of_word == pytest.approx(TINY.entropy() - class_entropy(CLUSTERS), abs=0.01)
    close_class, close_word = enumerated(noise_of(1.0), ClassBayes(TINY, noise_of(1.0)))
    assert close_class < of_class - 0.01
    assert close_word > of_word + 0.01


def test_one_class_and_a_class_for_each_word_are_masks() -> None:
    """All words in one class: a class token tells nothing. Each its own class: the word costs nothing after its class."""
    of_class, of_word = enumerated(noise_of(1.0, (0,) * VOCAB), ClassBayes(TINY, noise_of(1.0, (0,) * VOCAB)))
    assert of_class == pytest.approx(0, abs=1e-12)
    assert of_word == pytest.approx(TINY.entropy(), abs=1e-8)
    of_class, of_word = enumerated(noise_of(1.0, (0, 1, 2, 3)), ClassBayes(TINY, noise_of(1.0, (0, 1, 2, 3))))
    assert of_word == pytest.approx(0, abs=1e-12)
    assert of_class == pytest.approx(TINY.entropy(), abs=1e-8)


def test_where_the_detail_lives_a_mask_costs_what_masked_noise_says() -> None:
    """At t near 0 with a lead of 1, a1 is 1: no class is seen, and the integrands are equal."""
    noise, masked = noise_of(1.0), MaskedNoise(VOCAB + 1, MASK)
    t_B = torch.full((len(TINY.x_ST),), 1e-9, dtype=torch.float64)
    z_ST = torch.tensor([MASK, 1]).expand_as(TINY.x_ST)
    x_ST = torch.where(z_ST == MASK, TINY.x_ST, z_ST)
    logits = wrong(noise, z_ST)
    own = noise.nelbo(noise.log_probs(logits, z_ST, t_B), x_ST, z_ST, t_B)
    other = masked.nelbo(masked.log_probs(logits[..., : VOCAB + 1], z_ST), x_ST, z_ST, t_B)
    assert torch.allclose(own, other, rtol=1e-8)


def texts(rows: int) -> tuple[Tensor, Tensor]:
    x_BT = TINY.x_ST[torch.multinomial(TINY.p_S, rows, True, generator=torch.Generator().manual_seed(0))]
    return x_BT, torch.ones_like(x_BT, dtype=torch.bool)


@pytest.mark.parametrize("lead", [1.0, 3.0])
def test_estimators_have_the_bound_as_their_mean(lead: float) -> None:
    noise, (x_BT, free_BT) = noise_of(lead), texts(8000)
    predict, rng = partial(wrong, noise), torch.Generator().manual_seed(1)
    expected = enumerated(noise, predict)
    parts = loss.two_clocks_parts(noise, predict, x_BT, free_BT, rng)
    for part, mean in zip((*parts, loss.continuous(noise, predict, x_BT, free_BT, rng)), (*expected, sum(expected)), strict=True):
        assert abs(part.mean() - mean) < 4 * part.std() / len(x_BT) ** 0.5, (part.mean(), mean)
    assert (parts[0] + parts[1]).var() < loss.continuous(noise, predict, x_BT, free_BT, rng).var()


def test_given_positions_cost_nothing() -> None:
    noise, (x_BT, free_BT) = noise_of(), texts(6000)
    free_BT = free_BT.clone()
    free_BT[:, 0] = False
    predict, rng = ClassBayes(TINY, noise), torch.Generator().manual_seed(1)
    found = loss.two_clocks(noise, predict, x_BT, free_BT, rng)
    first_S = TINY.x_ST[:, 0]
    alone = torch.stack([TINY.p_S[first_S == v].sum() for v in range(VOCAB)])
    expected = TINY.entropy() - float(torch.special.entr(alone).sum())
    assert abs(found.mean() - expected) < 4 * found.std() / len(found) ** 0.5
    assert (loss.two_clocks(noise, predict, x_BT, torch.zeros_like(free_BT), rng) == 0).all()


def test_equal_weights_keep_the_scale_of_the_bound() -> None:
    """The mean weight is that of the events which Beta(2, 2) levels hide."""
    noise, rows, length = noise_of(3.0), 4000, 40
    x_BT, rng = torch.zeros(rows, length, dtype=torch.long), torch.Generator().manual_seed(0)
    count_B = loss.count_masks(loss.bell(loss.draw_levels(rows, rng)), torch.full((rows,), 2 * length))
    z_BT, early_B = noise.corrupt_count(x_BT, count_B, torch.ones_like(x_BT).bool(), rng)
    zeros = torch.zeros(z_BT.shape), torch.zeros(z_BT.shape)
    assert noise.next_costs(zeros, z_BT, count_B, early_B)[2].mean().item() / length == pytest.approx(noise.mean_weight, rel=0.05)


@pytest.mark.parametrize("lead", [1.0, 2.0])
def test_counted_noise_is_the_noise_at_some_time(lead: float) -> None:
    """A uniform number of hidden events, at a time that explains it: the shares of words, classes and masks are the clocks' own."""
    noise, rows, length = noise_of(lead), 300, 400
    x_BT, rng = torch.zeros(rows, length, dtype=torch.long), torch.Generator().manual_seed(0)
    near = torch.linspace(0.05, 0.95, rows, dtype=torch.float64)
    count_B = (length * (2 - near - (1 - (1 - near) ** lead))).round().long()
    z_BT, early_B = noise.corrupt_count(x_BT, count_B, torch.ones_like(x_BT).bool(), rng)
    far = 1 - (1 - near) ** lead
    for found, expected in (((z_BT == 0), near * far), ((z_BT == MASK), 1 - far), ((z_BT == MASK + 1), (1 - near) * far)):
        assert (found.double().mean(-1) - expected).abs().max() < 0.1
    assert (early_B / length - (1 - far) * near).abs().max() < 0.1


@pytest.mark.parametrize(("t", "s", "r"), [(1.0, 0.6, 0.1), (0.8, 0.5, 0.3)])
def test_posteriors_compose(t: float, s: float, r: float) -> None:
    """With one prediction for the whole way, t -> s -> r is t -> r, from every state."""
    noise = noise_of(2.0)
    states = torch.arange(noise.vocab_size)
    z_1T, logits_1TV = states[None], torch.randn(1, 1, noise.vocab_size, dtype=torch.float64).expand(1, noise.vocab_size, -1)
    logp_1TV = noise.log_probs(logits_1TV, z_1T)
    t_B, s_B, r_B = (torch.full((1,), x, dtype=torch.float64) for x in (t, s, r))
    first, second, way = (noise.posterior(logp_1TV, z_1T, *pair)[0] for pair in ((t_B, s_B), (s_B, r_B), (t_B, r_B)))
    assert torch.allclose(first.sum(-1), torch.ones(noise.vocab_size, dtype=torch.float64))
    assert torch.allclose(first @ second, way, atol=1e-12)


def test_the_posterior_is_that_of_the_kernels() -> None:
    """q(z_s | z_t, x) by Bayes' rule from marginals and moves, each counted from draws of the process itself."""
    noise, rows = noise_of(2.0), 40_000
    s_B, t_B = (torch.full((rows,), time, dtype=torch.float64) for time in (0.4, 0.7))
    x_BT, rng = torch.zeros(rows, 1, dtype=torch.long), torch.Generator().manual_seed(0)
    before_BT = noise.corrupt(x_BT, s_B, rng)
    after_BT = noise.renoise(before_BT, s_B, t_B, torch.rand(x_BT.shape, generator=rng, dtype=torch.float64))
    sure_11V = torch.nn.functional.one_hot(x_BT[:1], noise.vocab_size).double().log()
    for token, chance in zip((0, MASK + 1, MASK), chances(noise, 0.7).tolist(), strict=True):
        at_B = after_BT[:, 0] == token
        assert float(at_B.double().mean()) == pytest.approx(chance, abs=0.01)
        found_V = torch.bincount(before_BT[at_B, 0], minlength=noise.vocab_size) / at_B.sum()
        expected_V = noise.posterior(sure_11V, torch.tensor([[token]]), t_B[:1], s_B[:1])[0, 0]
        assert torch.allclose(found_V.double(), expected_V, atol=0.02)


def test_the_cost_of_a_step_is_the_divergence_of_its_posteriors() -> None:
    noise = noise_of(2.0)
    z_BT = torch.tensor([[MASK, MASK], [MASK + 1, 2], [MASK + 2, MASK]])
    x_BT = torch.tensor([[0, 1], [2, 2], [3, 1]])
    t_B, s_B = (torch.full((3,), time, dtype=torch.float64) for time in (0.7, 0.4))
    logp_BTV = noise.log_probs(wrong(noise, z_BT), z_BT)
    true_BTV = noise.posterior(torch.nn.functional.one_hot(x_BT, noise.vocab_size).double().log(), z_BT, t_B, s_B)
    model_BTV = noise.posterior(logp_BTV, z_BT, t_B, s_B)
    expected_BT = torch.special.xlogy(true_BTV, true_BTV / model_BTV.clamp(min=1e-300)).sum(-1)
    assert torch.allclose(noise.nelbo_step(logp_BTV, x_BT, z_BT, t_B, s_B), expected_BT, atol=1e-12)


def sample(noise: ClassNoise, rule: Any, steps: int, rows: int = 1500, given: list[int | None] | None = None) -> list[Frame]:
    canvas = Canvas.from_rows([given or [None] * LENGTH] * rows, fill=MASK)
    sampler = DiffusionSampler(ClassBayes(TINY, noise), noise, LENGTH, rule, steps)
    frames = list(sampler.steps(canvas, rng=generators(0, rows)))
    assert frames[-1].settled_BT.all()
    assert noise.words(frames[-1].tokens_BT).all()
    return frames


def reverse_law(noise: ClassNoise, steps: int) -> Tensor:
    """Probabilities (S,) of the reverse chain, state by state."""
    z_ZT = torch.tensor(list(itertools.product(range(noise.vocab_size), repeat=LENGTH)))
    mass_Z = (z_ZT == MASK).all(-1).double()
    for k in range(steps):
        t_Z, s_Z = (torch.full((len(z_ZT),), 1 - i / steps, dtype=torch.float64) for i in (k, k + 1))
        logp_ZTV = noise.log_probs(ClassBayes(TINY, noise)(z_ZT), z_ZT)
        move_ZTV = noise.posterior(logp_ZTV, z_ZT, t_Z, s_Z) if k < steps - 1 else logp_ZTV.exp()
        mass_Z = mass_Z @ torch.stack([move_ZTV[:, i, z_ZT[:, i]] for i in range(LENGTH)]).prod(0)
    words = noise.words(z_ZT).all(-1)
    assert float(mass_Z[words].sum()) == pytest.approx(1.0)
    law_S = torch.zeros(len(TINY.x_ST), dtype=torch.float64)
    return law_S.index_add(0, TINY.index(z_ZT[words]), mass_Z[words])


@pytest.mark.parametrize("steps", [1, 3])
def test_ancestral_sampling_is_the_enumerated_chain(steps: int) -> None:
    noise = noise_of(2.0)
    frames = sample(noise, TwoClocks(), steps)
    assert chi_square_p(frames[-1].tokens_BT, reverse_law(noise, steps), TINY) > 1e-3
    for before, after in itertools.pairwise(frames):
        assert (after.tokens_BT == before.tokens_BT)[before.settled_BT].all()
        assert (noise.words(after.tokens_BT) == after.settled_BT).all()


def test_one_token_a_step_in_two_stages_is_exact() -> None:
    noise = noise_of(2.0)
    frames = sample(noise, ClassesFirst(), 2 * LENGTH)
    assert chi_square_p(frames[-1].tokens_BT, TINY.p_S, TINY) > 1e-3
    shown = [[int((frame.tokens_BT == MASK).sum(-1).max()), int(noise.words(frame.tokens_BT).sum(-1).min())] for frame in frames]
    assert shown == [[2, 0], [1, 0], [0, 0], [0, 1], [0, 2]]


@pytest.mark.parametrize(("share", "steps"), [(1.0, 3), (0.01, 2), (0.5, 1)])
def test_every_share_of_the_steps_ends_in_words(share: float, steps: int) -> None:
    frames = sample(noise_of(), ClassesFirst(share), steps, rows=50, given=[None, 3])
    assert len(frames) - 1 <= steps
    assert (frames[-1].tokens_BT[:, 1] == 3).all()


def test_allowed_tokens_hold_at_classes_too() -> None:
    noise, canvas = noise_of(), Canvas.from_rows([[None] * LENGTH] * 200, fill=MASK)
    allowed = AllowedTokens([0, 1], noise.vocab_size, MASK)
    sampler = DiffusionSampler(ClassBayes(TINY, noise), noise, LENGTH, TwoClocks(), 3, constraint=allowed)
    *_, frame = sampler.steps(canvas, rng=generators(0, 200))
    assert set(frame.tokens_BT.flatten().tolist()) == {0, 1}


def test_greedy_draws_take_the_likeliest_word() -> None:
    noise = noise_of()
    frames = sample(noise, TwoClocks(Draw(temperature=0)), 1, rows=3)
    likeliest = ClassBayes(TINY, noise)(torch.tensor([[MASK, MASK]])).argmax(-1)
    assert (frames[-1].tokens_BT == likeliest).all()


def test_nll_is_that_of_the_probabilities() -> None:
    noise, (x_BT, free_BT) = noise_of(), texts(50)
    z_BT, _ = noise.corrupt_count(x_BT, torch.arange(50) % 5, free_BT, torch.Generator().manual_seed(0))
    logits = wrong(noise, z_BT)
    logp_BTV = noise.log_probs(logits, z_BT)
    for found, expected in zip(noise.nll(logits, x_BT, z_BT), noise.parts(logp_BTV, x_BT, z_BT), strict=True):
        assert torch.allclose(found, expected)
    assert torch.allclose(noise.cross_entropy(logp_BTV, x_BT, z_BT), torch.stack(noise.parts(logp_BTV, x_BT, z_BT)).sum(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": [0, 1, 0]}, "3 words have a class, there are 4"),
        ({"clusters": [0, 2, 0, 2]}, "without a gap"),
        ({"clusters": [0, 1, 2, 0]}, "not those of 4 words"),
        ({"lead": 0.5}, "at least 1"),
        ({"names": ["one"]}, "1 names cannot be those of 2"),
        ({"schedule": "geometric"}, "from exactly 1 to exactly 0"),
    ],
)
def test_settings_that_cannot_be_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process.make({"process": "classes", "clusters": list(CLUSTERS)} | settings, VOCAB + 3, MASK)


def test_settings_make_the_process_again() -> None:
    noise = process.make({"process": "classes", "clusters": list(CLUSTERS), "names": ["[a]", "[b]"], "lead": 3.0}, VOCAB + 3, MASK)
    assert process.make(process.settings(noise), VOCAB + 3, MASK) == noise
    assert process.parse("classes:3") == {"process": "classes", "lead": 3.0}
