"""Rules that choose which masks to write: each against its own law, and the bounds that some of them promise.

Shapes: B rows, T positions, V vocabulary, S = V^T sequences, N calls or positions chosen.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from chains import Choose, Given, Guess, State, ancestral_law, any_order_law, chosen_law, copies, distance, guesses, masked_noise, unmask
from dlm.errors import InputError
from dlm.noise import process
from dlm.noise.masked import MaskedNoise
from dlm.sampling import registry
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import Rule, Step
from dlm.sampling.diffusion.unmasking import EntropyBudget, Factor, FirstHitting, KLStable, Threshold, TopScore
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame
from oracle import BayesDenoiser, Noted, Tiny, chi_square_of_counts, chi_square_p

TINY = Tiny(3, 4, seed=0, concentration=0.2)


def data_law(tiny: Tiny, given: Given) -> Tensor:
    """p(x | what is given) (S,)."""
    fits_S = torch.stack([tiny.x_ST[:, i] == x for i, x in enumerate(given) if x is not None] or [tiny.p_S >= 0]).all(0)
    return tiny.p_S * fits_S / (tiny.p_S * fits_S).sum()


@pytest.mark.parametrize("word", ["linear", "cosine", "log-linear:0.2"])
@pytest.mark.parametrize("given", [(None,) * 4, (1, None, None, None), (None, 1, None, 2)], ids=str)
def test_first_hitting_draws_the_data_with_one_call_a_mask(given: Given, word: str) -> None:
    denoiser = BayesDenoiser(TINY)
    samples = unmask(TINY, FirstHitting(), 2, word=word, given=given, rows=2500, denoiser=denoiser)
    assert chi_square_p(samples, data_law(TINY, given), TINY) > 1e-3
    assert denoiser.calls == given.count(None)


def test_first_hitting_draws_the_law_of_a_network_that_contradicts_itself() -> None:
    noted, given = Noted(TINY.vocab, TINY.length), (None, None, 2, None)
    samples = unmask(TINY, FirstHitting(), 1, denoiser=noted)
    assert chi_square_p(samples, any_order_law(TINY, noted), TINY) > 1e-3
    assert chi_square_p(samples, any_order_law(TINY, noted, draw=Draw(0.7)), TINY) < 1e-6
    cold = unmask(TINY, FirstHitting(Draw(0.7)), 1, given=given, denoiser=noted)
    assert chi_square_p(cold, any_order_law(TINY, noted, given, Draw(0.7)), TINY) > 1e-3
    # the distance that this has to see: everything at once, or always from left to right
    assert chi_square_p(unmask(TINY, Threshold(1e-9), 1, denoiser=noted), any_order_law(TINY, noted), TINY) < 1e-6


@pytest.mark.parametrize(("block_length", "given"), [(1, ()), (2, ()), (2, (None, 1, None, None))], ids=str)
def test_blocks_have_the_law_of_their_own_order(block_length: int, given: Given) -> None:
    noted = Noted(TINY.vocab, TINY.length)
    samples = unmask(TINY, FirstHitting(), 1, given=given, denoiser=noted, block_length=block_length)
    assert len(noted.seen) == TINY.length - sum(x is not None for x in given)
    assert chi_square_p(samples, any_order_law(TINY, noted, given, block_length=block_length), TINY) > 1e-3
    assert chi_square_p(samples, any_order_law(TINY, noted, given), TINY) < 1e-6


@pytest.mark.parametrize("word", ["linear", "cosine", "log-linear:0.2"])
def test_first_hitting_gives_the_network_the_time_at_which_a_position_is_reached(word: str) -> None:
    """alpha at the n-th call is the n-th of uniforms in order, whose distribution is a binomial tail; the order is any, equally often."""
    rows, masks, noise = 2500, 4, MaskedNoise(6, 5, masked_noise(TINY, word).schedule)
    runs = []
    for steps in (2, 300):
        denoiser = Noted(5, 6)
        sampler = DiffusionSampler(denoiser, noise, 6, FirstHitting(), steps)
        frames = list(sampler.steps(copies([None, 1, None, None, 2, None], 5, rows), rng=generators(0, rows)))
        runs.append((torch.stack([t_B for _, t_B in denoiser.seen]), torch.stack([frame.tokens_BT for frame in frames])))
    (t_NB, tokens_NBT), again = runs
    assert torch.equal(t_NB, again[0])
    assert torch.equal(tokens_NBT, again[1])
    assert len(t_NB) == masks
    assert (t_NB[1:] < t_NB[:-1]).all()
    last = noise.schedule.alpha(torch.ones((), dtype=torch.float64))
    u_NB = (noise.schedule.alpha(t_NB) - last) / (1 - last)
    for n, u_B in enumerate(u_NB, 1):
        tail_B = torch.stack([math.comb(masks, j) * u_B**j * (1 - u_B) ** (masks - j) for j in range(n, masks + 1)]).sum(0)
        assert chi_square_of_counts(torch.histc(tail_B, 20, 0, 1), torch.full((20,), 0.05)) > 1e-3, n
    first_BT = (tokens_NBT != 5).int().argmax(0)[:, [0, 2, 3, 5]]  # the call that writes each position
    order_B = (first_BT * masks ** torch.arange(masks)).sum(-1)
    assert (first_BT.sort(-1).values == torch.arange(masks)).all()
    assert chi_square_of_counts(torch.bincount(order_B)[torch.bincount(order_B) > 0], torch.full((24,), 1 / 24)) > 1e-3


def by(score: Callable[[list[float], int], float], extra: Callable[[list[list[float]], list[list[float]] | None], int]) -> Choose:
    """The masks of highest score(guess, drawn token): the share of the steps left, or `extra` (guesses in that order, last ones)."""

    def choose(masked: list[int], mu: Guess, drawn: dict[int, int], left: int, last: Guess | None) -> list[int]:
        order = sorted(masked, key=lambda i: -score(mu[i], drawn[i]))
        count = extra([mu[i] for i in order], [last[i] for i in order] if last else None)
        return order[: max(count, -(-len(masked) // left))]

    return choose


def nats(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def margin(p: list[float], token: int) -> float:
    return sorted(p)[-1] - sorted(p)[-2]


def none(order: Guess, last: Guess | None) -> int:
    return 0


def factor(bound: float) -> Callable[[Guess, Guess | None], int]:
    return lambda order, last: max((n for n, p in enumerate(order, 1) if (n + 1) * (1 - max(p)) < bound), default=0)


def budget(bound: float) -> Callable[[Guess, Guess | None], int]:
    def count(order: Guess, last: Guess | None) -> int:
        entropies = [nats(p) for p in order]
        return max(n for n in range(1, len(order) + 1) if sum(entropies[:n]) - max(entropies[:n]) <= bound)

    return count


def stable(threshold: float, kl: float) -> Choose:
    def choose(masked: list[int], mu: Guess, drawn: dict[int, int], left: int, last: Guess | None) -> list[int]:
        def moved(i: int) -> float:
            return sum(p * math.log(p / q) for p, q in zip(mu[i], last[i], strict=True) if p > 0) if last else math.inf

        ready = {i for i in masked if max(mu[i]) >= threshold and moved(i) <= kl}
        order = sorted(masked, key=lambda i: (i not in ready, -max(mu[i])))
        return order[: max(len(ready), -(-len(masked) // left))]

    return choose


def top(p: list[float], token: int) -> float:
    return max(p)


LAWS: dict[str, tuple[Rule, Choose]] = {
    "topk": (TopScore(), by(lambda p, token: p[token], none)),
    "margin": (TopScore(score="margin"), by(margin, none)),
    "entropy": (TopScore(score="entropy"), by(lambda p, token: -nats(p), none)),
    "factor:1": (Factor(), by(top, factor(1.0))),
    "factor:2": (Factor(2.0), by(top, factor(2.0))),
    "entropy-bound:0": (EntropyBudget(0.0), by(lambda p, token: -nats(p), budget(0.0))),
    "entropy-bound:1": (EntropyBudget(1.0), by(lambda p, token: -nats(p), budget(1.0))),
    "klass:0.4,0.1": (KLStable(0.4, 0.1), stable(0.4, 0.1)),
    "klass:0.6,0.3": (KLStable(0.6, 0.3), stable(0.6, 0.3)),
}
EXACT = ("margin", "entropy", "entropy-bound:0")  # one token a call, wherever it is: the chain rule


@cache
def law_of(name: str, steps: int) -> Tensor:
    return chosen_law(TINY, steps, LAWS[name][1], remembers=name.startswith("klass"))


@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize("name", LAWS)
def test_every_rule_draws_its_law(name: str, steps: int) -> None:
    assert chi_square_p(unmask(TINY, LAWS[name][0], steps, rows=2000), law_of(name, steps), TINY) > 1e-3


def test_the_laws_tell_the_rules_apart() -> None:
    """So that the test above can fail: at three steps each law is seen not to be another's, and at eight not another setting's."""
    apart = [("topk", "margin"), ("margin", "entropy"), ("entropy", "factor:1"), ("factor:1", "factor:2"), ("margin", "klass:0.6,0.3")]
    for name, other in [*apart, ("entropy", "entropy-bound:1"), ("factor:1", "klass:0.6,0.3"), ("factor:2", "entropy-bound:1")]:
        assert float((law_of(name, 3) - law_of(other, 3)).abs().sum() / 2) > 0.01, (name, other)
        assert chi_square_p(unmask(TINY, LAWS[name][0], 3, rows=2000), law_of(other, 3), TINY) < 1e-3, (name, other)
    for name, other in itertools.combinations((name for name in LAWS if name not in EXACT), 2):
        assert float((law_of(name, 8) - law_of(other, 8)).abs().sum() / 2) > 0.05, (name, other)


@pytest.mark.parametrize("name", LAWS)
def test_total_variation_to_the_data(name: str) -> None:
    """All at once is the product of the marginals for every rule. One token a call is exact where the order heeds no drawn token."""
    once, two, each = (distance(law_of(name, steps), TINY) for steps in (1, 2, TINY.length))
    print(f"total variation {name:16} 1 step {once:.4f}  2 steps {two:.4f}  {TINY.length} steps {each:.4f}")
    assert once == pytest.approx(distance(ancestral_law(TINY, 1), TINY))
    assert once > 0.5
    assert once > two > 0.2
    assert once > each
    assert (each < 1e-9) == (name in EXACT)
    if name == "topk":  # its choice of the likely drawn token bends the law, the more the more often it chooses
        assert each > two


def state_of(tiny: Tiny, rule: Rule, z_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(log mu (B, T, V), which masks the rule writes (B, T)) with steps to spare."""
    rows, noise = len(z_BT), masked_noise(tiny)
    logp_BTV, t_B = noise.log_probs(BayesDenoiser(tiny)(z_BT), z_BT), torch.full((rows,), 0.5, dtype=torch.float64)
    step = Step(z_BT, z_BT == tiny.mask_id, logp_BTV, t_B, t_B / 2, torch.full((rows,), 99), 100, noise)
    return logp_BTV, rule(step, generators(0, rows)) != z_BT


def states(concentration: float, seeds: int) -> Iterator[tuple[Tiny, Tensor]]:
    """Random distributions with all their partly masked texts that can be."""
    for seed in range(seeds):
        tiny = Tiny(3, 4, seed, concentration)
        z_BT = torch.where(tiny.patterns()[:, None], tiny.mask_id, tiny.x_ST[tiny.p_S > 1e-6]).reshape(-1, 4)
        z_BT = torch.tensor(sorted(set(map(tuple, z_BT.tolist()))))
        yield tiny, z_BT[(z_BT == tiny.mask_id).any(-1)]


def joint(tiny: Tiny, z: list[int], places: list[int]) -> dict[State, float]:
    """p(x at these places | z)."""
    law: dict[State, float] = defaultdict(float)
    for x, p in zip(tiny.x_ST.tolist(), tiny.p_S.tolist(), strict=True):
        if all(token in (tiny.mask_id, x[i]) for i, token in enumerate(z)):
            law[tuple(x[i] for i in places)] += p
    return {x: p / sum(law.values()) for x, p in law.items()}


def one_by_one(guess: Callable[[State], Guess], z: list[int], places: list[int]) -> list[int]:
    """Greedy, the surest of the places first."""
    z, left = list(z), set(places)
    while left:
        mu = guess(tuple(z))
        first = max(left, key=lambda i: max(mu[i]))
        z[first] = mu[first].index(max(mu[first]))
        left.remove(first)
    return z


@pytest.mark.parametrize(("bound", "holds"), [(1.0, True), (2.0, False)])
def test_greedy_drawing_within_factor_1_is_greedy_drawing_one_by_one(bound: float, holds: bool) -> None:
    """Fast-dLLM, theorem 1: with (n + 1) (1 - p_n) < 1 the product of the marginals peaks where the joint does. At 2 it need not."""
    several = wrong = 0
    for tiny, z_BT in states(0.04, 8):
        logp_BTV, chosen_BT = state_of(tiny, Factor(bound, Draw(0.0)), z_BT)
        guess = guesses(tiny)
        for z, p_T, best, chosen_T in zip(z_BT.tolist(), logp_BTV.exp().amax(-1), logp_BTV.argmax(-1).tolist(), chosen_BT, strict=True):
            places, masked = chosen_T.nonzero().squeeze(-1).tolist(), [i for i, token in enumerate(z) if token == tiny.mask_id]
            order = sorted(1 - float(p_T[i]) for i in masked)
            counts = [n for n, doubt in enumerate(order, 1) if (n + 1) * doubt < bound]
            assert len(places) == max(counts, default=1)
            assert sorted(1 - float(p_T[i]) for i in places) == order[: len(places)]
            if len(places) < 2:
                continue
            law, likeliest = joint(tiny, z, places), tuple(best[i] for i in places)
            peaks = max(law, key=lambda x: law[x]) == likeliest
            same = one_by_one(guess, z, places) == [best[i] if i in places else token for i, token in enumerate(z)]
            several, wrong = several + (order[len(places) - 1] > 1e-3), wrong + (not peaks or not same)
    assert several > 20
    assert (wrong == 0) == holds


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.7])
def test_what_is_written_at_once_says_little_of_each_other(bound: float) -> None:
    """Total correlation <= sum H - max H <= bound, and one position more would be too many."""
    several, most = 0, 0.0
    for tiny, z_BT in states(0.1, 4):
        logp_BTV, chosen_BT = state_of(tiny, EntropyBudget(bound), z_BT)
        for z, p_TV, chosen_T in zip(z_BT.tolist(), logp_BTV.exp().tolist(), chosen_BT, strict=True):
            places, entropies = chosen_T.nonzero().squeeze(-1).tolist(), [nats(p) for p in p_TV]
            inside = [entropies[i] for i in places]
            rest = sorted(entropies[i] for i, token in enumerate(z) if token == tiny.mask_id and i not in places)
            assert places
            assert sum(inside) - max(inside) <= bound + 1e-9
            assert not rest or (rest[0] >= max(inside) and sum(inside) > bound)
            correlation = sum(inside) - nats(list(joint(tiny, z, places).values()))
            assert correlation <= sum(inside) - max(inside) + 1e-9
            several, most = several + (len(places) > 1), max(most, correlation)
    assert bound == 0 or (several > 20 and most > 0.05 * bound)


def test_stability_is_measured_from_the_last_call_of_the_same_block() -> None:
    """The first call of a block has nothing to compare with and writes its share; a guess that never moves is stable in the second."""

    def still(z_BQ: Tensor, t_B: Tensor | None = None, **_: object) -> Tensor:
        return torch.tensor([3.0, 0.0, 0.0, 0.0]).expand(*z_BQ.shape, 4)

    sampler = DiffusionSampler(still, MaskedNoise(4, 3), 8, KLStable(), 32, block_length=4)
    frames = list(sampler.steps(Canvas.from_rows([[None] * 16], fill=3), rng=generators(0, 1)))
    assert [int((frame.tokens_BT != 3).sum()) for frame in frames] == [1, 4, 5, 8, 9, 12, 13, 16]


ROWS: list[list[int | None]] = [[None, 0], [1, None, 2, None, None, 3] * 2, [None] * 13]  # the first is done first


def run(word: str, rows: list[list[int | None]], seed: int = 0, **options: Any) -> list[Frame]:
    noise = MaskedNoise(6, 5)
    sampler = DiffusionSampler(Noted(5, 8), noise, 8, registry.make(word, Draw(), noise), 6, **options)
    return list(sampler.steps(Canvas.from_rows(rows, fill=5), rng=generators(seed, len(rows))))


@pytest.mark.parametrize("options", [{"context": 2}, {"context": 3, "block_length": 4}], ids=str)
@pytest.mark.parametrize(
    "word",
    [
        *(one.name for one in registry.known("masked") if one.rule),
        "factor:3",
        "entropy-bound:2",
        "klass:0.3",
        "revoke:0.3",
        "remdm-cap:0.5",
    ],
)
def test_a_row_alone_is_the_row_in_a_batch(word: str, options: dict[str, int]) -> None:
    """Every row at its own pace, through windows and blocks; what was given stays, what was settled too, and no mask is left."""
    frames, last_BT = run(word, ROWS, seed=7, **options), torch.full((3, 13), 5)
    for i, row in enumerate(ROWS):
        alone = run(word, [row], seed=7 + i, **options)
        texts = [frame.tokens_BT[0].tolist() for frame in alone]
        together = [frame.tokens_BT[i, : len(row)].tolist() for frame in frames[: len(texts)]]
        assert together == texts
        assert len(frames) >= len(texts)
        assert all(given in (None, token) for given, token in zip(row, texts[-1], strict=True))
        assert 5 not in texts[-1]
        assert frames[-1].tokens_BT[i, : len(row)].tolist() == texts[-1]
    settled_BT = torch.zeros_like(last_BT, dtype=torch.bool)
    for frame in frames:
        assert torch.equal(frame.tokens_BT[settled_BT], last_BT[settled_BT])
        assert (frame.settled_BT | ~settled_BT).all()
        last_BT, settled_BT = frame.tokens_BT, frame.settled_BT
    assert settled_BT.all()


WORDS: list[tuple[str, Rule]] = [
    ("first-hitting", FirstHitting(Draw(0.5))),
    ("margin", TopScore(Draw(0.5), "margin")),
    ("entropy", TopScore(Draw(0.5), "entropy")),
    ("factor", Factor(1.0, Draw(0.5))),
    ("factor:2.5", Factor(2.5, Draw(0.5))),
    ("entropy-bound", EntropyBudget(0.1, Draw(0.5))),
    ("entropy-bound:3", EntropyBudget(3.0, Draw(0.5))),
    ("klass", KLStable(0.6, 0.01, Draw(0.5))),
    ("klass:0.8", KLStable(0.8, 0.01, Draw(0.5))),
]


@pytest.mark.parametrize(("word", "rule"), WORDS)
def test_words(word: str, rule: Rule) -> None:
    assert registry.make(word, Draw(0.5), masked_noise(TINY)) == rule


BAD_WORDS = ["first-hitting:2", "margin:0.5", "entropy:1", "factor:0", "factor:-1", "factor:inf", "factor:nan", "factor:x"]


@pytest.mark.parametrize(
    "word", [*BAD_WORDS, "entropy-bound:-0.1", "entropy-bound:nan", "entropy-bound:inf", "klass:0", "klass:1.1", "klass:nan"]
)
def test_bad_words(word: str) -> None:
    with pytest.raises(InputError):
        registry.make(word, Draw(), masked_noise(TINY))


@pytest.mark.parametrize("word", ["first-hitting", "margin", "entropy", "factor", "klass"])
def test_what_unmasks_needs_masks(word: str) -> None:
    with pytest.raises(InputError, match="needs masked noise"):
        registry.make(word, Draw(), process.make({"process": "uniform"}, 4, 3))


@pytest.mark.parametrize("bad", [{"kl": -0.1}, {"kl": float("nan")}, {"kl": float("inf")}, {"threshold": 0.0}])
def test_bad_settings(bad: dict[str, Any]) -> None:
    said = "threshold must be above 0" if "threshold" in bad else "KL divergence in nats must be at least 0"
    with pytest.raises(InputError, match=said):
        KLStable(**bad)
    with pytest.raises(InputError, match="unknown score 'luck'; known: confidence, margin, entropy"):
        TopScore(score="luck")
