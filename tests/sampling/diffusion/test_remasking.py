"""Rules that take back: their laws enumerated, what they take back and when, and the shadows that two of them ask.

Shapes: B rows, T positions, V vocabulary, S = V^T sequences, Z = (V + 1)^T states of the chain.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from chains import (
    TINY,
    Z_ZT,
    State,
    ancestral_law,
    copies,
    distance,
    guesses,
    hot,
    law,
    masked_noise,
    moved_law,
    of_sequences,
    unmask,
)
from dlm.errors import InputError
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.noise import process, schedule
from dlm.noise.masked import MaskedNoise
from dlm.sampling import registry
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import Rule, Step
from dlm.sampling.diffusion.remasking import KINDS, Planned, Remask, Revoke
from dlm.sampling.diffusion.unmasking import TopScore
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Frame
from oracle import BayesDenoiser, Noted, Tiny, chi_square_of_counts, chi_square_p

MASK = TINY.mask_id
PEAKED = Tiny(3, 4, seed=0, concentration=0.2)


def held(t: float) -> float:
    """The times of `loop`: down to 0.1 in the first third, there in the second, to 0 in the last."""
    if t > 2 / 3:
        return 0.1 + (t - 2 / 3) / (1 / 3) * 0.9
    return 0.1 if t > 1 / 3 - 1e-9 else t / (1 / 3) * 0.1


def levels(kind: str, eta: float, noise: Any, t: float, s: float) -> tuple[float, float, float]:
    """(alpha_t, alpha_s, sigma), sigma of a whole row for `conf` (2503.00307, section 4)."""
    at, to = (held(t), held(s)) if kind == "loop" else (t, s)
    alpha_t, alpha_s = (float(noise.schedule.alpha(torch.tensor(x, dtype=torch.float64))) for x in (at, to))
    most = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
    inside = kind != "loop" or (s > 1 / 3 - 1e-9 and t < 2 / 3 + 1e-9)
    return alpha_t, alpha_s, (min(eta, most) if kind in ("cap", "loop") else eta * most) * inside * (s > 0)


def revealed(alpha_t: float, alpha_s: float, sigma: float) -> float:
    return (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)


def remasked(kind: str, eta: float, noise: Any, mu_ZTV: Tensor, t: float, s: float, left: int) -> Tensor:
    alpha_t, alpha_s, sigma = levels(kind, eta, noise, t, s)
    reveal = revealed(alpha_t, alpha_s, sigma) if left > 1 else 1.0
    mask_V = hot(torch.tensor(MASK))
    visible_ZTV = (1 - sigma) * hot(Z_ZT) + sigma * mask_V
    return torch.where((Z_ZT == MASK)[..., None], reveal * mu_ZTV + (1 - reveal) * mask_V, visible_ZTV)


def surest_law(eta: float, steps: int, word: str = "linear") -> Tensor:
    """Probabilities (S,) of `conf`, whose state is the text with the confidence at which each token was written."""
    noise, guess = masked_noise(TINY, word), guesses(TINY)
    states: dict[tuple[State, tuple[float, ...]], float] = {((MASK,) * TINY.length, (math.inf,) * TINY.length): 1.0}
    for k in range(steps):
        alpha_t, alpha_s, sigma = levels("conf", eta, noise, 1 - k / steps, 1 - (k + 1) / steps if k + 1 < steps else 0.0)
        reveal, after = revealed(alpha_t, alpha_s, 0.0) if k + 1 < steps else 1.0, defaultdict[Any, float](float)
        for (z, sure), mass in states.items():
            weight, mu = [math.exp(-p) for p in sure], guess(z)
            ways: list[list[tuple[int, float, float]]] = []
            for i, token in enumerate(z):
                if token == MASK:
                    ways.append([(x, p, reveal * p) for x, p in enumerate(mu[i][:MASK])] + [(MASK, math.inf, 1 - reveal)])
                else:
                    back = sigma * weight[i] / sum(weight)
                    ways.append([(token, sure[i], 1 - back), (MASK, math.inf, back)])
            for way in itertools.product(*ways):
                chance = math.prod(p for *_, p in way)
                if chance > 0:
                    after[tuple(x for x, *_ in way), tuple(p for _, p, _ in way)] += mass * chance
        states = after
    law_z: dict[State, float] = defaultdict(float)
    for (z, _), mass in states.items():
        law_z[z] += mass
    return of_sequences(law_z, TINY)


def doubted(threshold: float, keep: float, z: State, drawn: dict[int, int], left: int, last: State | None) -> State:
    """`Revoke`: the sure masks are written, then fewer than were written are taken back, the unlikeliest first."""
    guess = posterior()
    surest = sorted(drawn, key=lambda i: -max(guess(z)[i]))
    count = max(sum(max(guess(z)[i]) >= threshold for i in drawn), math.ceil(len(drawn) / left))
    likely = {i: guess((*z[:i], MASK, *z[i + 1 :]))[i][token] for i, token in enumerate(z) if token != MASK}
    doubtful = sorted((i for i in likely if likely[i] < keep), key=lambda i: likely[i])
    dropped = doubtful[: max(count - 1, 0)] if left > 1 else []
    return tuple(drawn[i] if i in surest[:count] else MASK if i in dropped else token for i, token in enumerate(z))


def planned(eta: float, steps: int, z: State, drawn: dict[int, int], left: int, last: State | None) -> State:
    """`Planned` with alpha = 1 - t: the best of all tokens, drawn and standing, as many as the grid says."""
    guess, text = posterior(), tuple(drawn.get(i, token) for i, token in enumerate(z))
    score = {i: math.log(max(guess((*z[:i], MASK, *z[i + 1 :]))[i][token], 1e-300)) for i, token in enumerate(text)}
    order = sorted(score, key=lambda i: -score[i] * (1 if i in drawn else eta))
    kept = order[: -(-len(z) * (steps - left + 1) // steps)]
    return tuple(token if i in kept else MASK for i, token in enumerate(text))


@cache
def posterior() -> Any:
    return guesses(PEAKED)


def tiny_of(word: str) -> Tiny:
    return PEAKED if word.startswith(("revoke", "planner")) else TINY


@cache
def law_of(word: str, steps: int) -> Tensor:
    name, _, setting = word.partition(":")
    if name == "remdm-conf":
        return surest_law(float(setting), steps)
    if name == "revoke":
        return moved_law(PEAKED, steps, partial(doubted, float(setting), 0.9))
    if name == "planner":
        return moved_law(PEAKED, steps, partial(planned, float(setting), steps))
    return law(masked_noise(TINY), steps, partial(remasked, name.removeprefix("remdm-"), float(setting)))


LAWS = ["remdm-cap:0.3", "remdm-rescale:0.6", "remdm-conf:1", "remdm-loop:0.8", "revoke:0.6", "planner:1", "planner:3"]


@pytest.mark.parametrize("steps", [2, 3, 6])
@pytest.mark.parametrize("word", LAWS)
def test_every_rule_draws_its_law(word: str, steps: int) -> None:
    if (word, steps) == ("remdm-conf:1", 6):
        steps = 4  # it remembers, and the states are many
    tiny = tiny_of(word)
    samples = unmask(tiny, registry.make(word, Draw(), masked_noise(tiny)), steps, rows=2000)
    assert chi_square_p(samples, law_of(word, steps), tiny) > 1e-3


@pytest.mark.slow
def test_the_test_of_the_law_can_fail() -> None:
    """Other settings and rules that take nothing back are seen."""
    for word, other, steps in [("revoke:0.6", "revoke:0.5", 3), ("planner:1", "planner:3", 3)]:
        samples = unmask(PEAKED, registry.make(word, Draw(), masked_noise(PEAKED)), steps, rows=2000)
        assert chi_square_p(samples, law_of(other, steps), PEAKED) < 1e-6
    never_S = moved_law(PEAKED, 4, partial(doubted, 0.6, 0.0))
    assert chi_square_p(unmask(PEAKED, Revoke(0.6), 4), never_S, PEAKED) < 1e-6
    assert chi_square_p(unmask(PEAKED, Revoke(0.6, 0.0), 4), never_S, PEAKED) > 1e-3
    assert chi_square_p(unmask(TINY, Remask("loop", 0.8), 3), law_of("remdm-cap:0.8", 3), TINY) < 1e-3
    assert chi_square_p(unmask(TINY, Remask("rescale", 1.0), 6), ancestral_law(TINY, 6), TINY) < 1e-3


@pytest.mark.parametrize("word", LAWS)
def test_total_variation_to_the_data(word: str) -> None:
    tiny = tiny_of(word)
    once, two, each = (distance(law_of(word, steps), tiny) for steps in (1, 2, tiny.length))
    chains = [distance(ancestral_law(tiny, steps), tiny) for steps in (1, 2, tiny.length)]
    print(f"total variation {word:18} 1 step {once:.4f}  2 steps {two:.4f}  {tiny.length} steps {each:.4f}; ancestral", end=" ")
    print("  ".join(f"{x:.4f}" for x in chains))
    assert once == pytest.approx(chains[0])
    assert once > 0.25
    assert 0 < two < once
    assert 0 < each < once


@pytest.mark.parametrize("word", ["linear", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_eta_0_is_ancestral(kind: str, word: str) -> None:
    """But for `loop`, whose grid is another one."""
    grid = ancestral_law(TINY, 4, word)
    law_S = law(masked_noise(TINY, word), 4, partial(remasked, kind, 0.0))
    assert bool((law_S - grid).abs().sum() < 1e-9) == (kind != "loop")
    assert chi_square_p(unmask(TINY, Remask(kind, 0.0), 4, word=word, rows=2000), law_S, TINY) > 1e-3


def masks_of(rule: Rule, steps: int, noise: MaskedNoise, rows: int = 800) -> Tensor:
    """bool (steps + 1, rows, 12): what is masked before and after each step of one window."""
    sampler = DiffusionSampler(Noted(5, 12), noise, 12, rule, steps)
    frames = list(sampler.steps(copies([None] * 12, 5, rows), rng=generators(0, rows)))
    assert len(frames) == steps
    assert not (frames[-1].tokens_BT == 5).any()
    return torch.stack([torch.full((rows, 12), 5), *(frame.tokens_BT for frame in frames)]) == 5


def binomial(n: int, p: float) -> Tensor:
    return torch.tensor([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)], dtype=torch.float64)


@pytest.mark.parametrize("word", ["linear", "cosine"])
@pytest.mark.parametrize("rule", [Remask("cap", 0.3), Remask("rescale", 0.9), Remask("rescale", 1.0), Remask("loop", 0.5)], ids=str)
def test_the_number_of_masks_follows_alpha(rule: Remask, word: str) -> None:
    steps, noise = 9, MaskedNoise(6, 5, schedule.parse(word))
    masked_NBT = masks_of(rule, steps, noise)
    for k in range(1, steps):
        alpha = levels(rule.kind, rule.eta, noise, 1 - (k - 1) / steps, 1 - k / steps)[1]
        assert chi_square_of_counts(torch.bincount(masked_NBT[k].sum(-1), minlength=13), binomial(12, 1 - alpha)) > 1e-3, k
    back_N = (masked_NBT[1:] & ~masked_NBT[:-1]).sum((1, 2))
    assert back_N[-1] == 0
    assert back_N[1:-1].sum() > 100


@pytest.mark.parametrize("steps", [3, 6, 9])
def test_loop_takes_back_in_the_middle_third_alone(steps: int) -> None:
    """Where alpha stands still: as many tokens are taken back as masks are revealed."""
    masked_NBT = masks_of(Remask("loop", 0.5), steps, MaskedNoise(6, 5), rows=600)
    back_N = (masked_NBT[1:] & ~masked_NBT[:-1]).sum((1, 2))
    middle = range(steps // 3, 2 * steps // 3)
    assert all((back > 0) == (k in middle) for k, back in enumerate(back_N.tolist()))
    count_N = masked_NBT.double().mean((1, 2))
    assert all(float(count_N[k]) == pytest.approx(0.1, abs=0.02) for k in range(middle.start, middle.stop + 1))


def step_of(z_BT: Tensor, noise: MaskedNoise, denoiser: Any, t: float, s: float, left: int, steps: int, closed: int = 0) -> Step:
    """A step of a checking rule in the middle of a run, the first `closed` positions given."""
    rows, length = z_BT.shape
    open_BT = torch.ones_like(z_BT, dtype=torch.bool)
    t_B, s_B = (torch.full((rows,), x, dtype=torch.float64) for x in (t, s))
    open_BT[:, :closed] = False
    logits_BQV = denoiser(torch.cat([z_BT, torch.full_like(z_BT, noise.mask_id)], 1), t_B, pattern="shadow").double()
    logp_BTV = noise.log_probs(logits_BQV[:, :length], z_BT)
    return Step(z_BT, open_BT, logp_BTV, t_B, s_B, torch.full((rows,), left), steps, noise, {}, logits_BQV[:, length:])


def test_conf_takes_back_what_was_written_with_doubt() -> None:
    """Token i with eta sigma_max softmax(-p)_i, which sum to eta sigma_max; what is written is noted with its probability."""
    rows, noise, eta, t, s = 20_000, MaskedNoise(6, 5), 0.8, 0.5, 0.4
    z_BT = torch.tensor([[4, 1, 2, 5, 0, 3]]).expand(rows, -1)
    sure_T = torch.tensor([torch.nan, 0.05, 0.5, torch.nan, 0.95, 0.3], dtype=torch.float64)  # the first is given
    step = step_of(z_BT, noise, Noted(5, 6), t, s, 4, 10, closed=1)
    before_BT = sure_T.log().expand(rows, -1).clone()
    step.memory["sure"] = before_BT
    after_BT = Remask("conf", eta)(step, generators(0, rows))
    sigma = eta * (1 - (1 - s)) / (1 - t)
    weight_T = (-sure_T).exp().nan_to_num(0.0)
    chance_T = sigma * weight_T / weight_T.sum()
    back_BT = (after_BT == 5) & (z_BT != 5)
    assert not back_BT[:, 0].any()
    assert float(chance_T.sum()) == pytest.approx(sigma)
    assert sigma == pytest.approx(0.64)
    assert float(back_BT.sum(-1).double().mean()) == pytest.approx(sigma, abs=0.02)
    for i in (1, 2, 4, 5):
        assert chi_square_of_counts(torch.bincount(back_BT[:, i].long()), torch.stack([1 - chance_T[i], chance_T[i]])) > 1e-3
    assert back_BT[:, 1].sum() > back_BT[:, 5].sum() > back_BT[:, 2].sum() > back_BT[:, 4].sum()
    written_B = after_BT[:, 3] != 5
    assert float(written_B.double().mean()) == pytest.approx(((1 - s) - (1 - t)) / t, abs=0.02)
    noted_BT = step.memory["sure"]
    logp_B = step.logp_BTV[:, 3].gather(-1, after_BT[:, 3:4].clamp(max=4)).squeeze(-1)
    assert torch.equal(noted_BT[written_B, 3], logp_B[written_B])
    assert noted_BT[~written_B, 3].isnan().all()
    assert torch.equal(noted_BT[:, [1, 2, 4, 5]], before_BT[:, [1, 2, 4, 5]])


def network(layers: int, conv: int = 0) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(TransformerConfig(7, 10, layers=layers, heads=2, width=16, conv=conv)).eval().requires_grad_(False).double()
    for weight in made.parameters():  # fresh blocks are the identity: make every position matter
        weight.copy_(0.4 * torch.randn_like(weight))
    return made


def shadows(model: Any, z_BT: Tensor) -> tuple[Tensor, Tensor]:
    logits_BQV = model(torch.cat([z_BT, torch.full_like(z_BT, 6)], 1), torch.zeros(len(z_BT)), pattern="shadow")
    return logits_BQV[:, : z_BT.shape[1]], logits_BQV[:, z_BT.shape[1] :]


@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_shadow_changes_nothing_and_is_the_guess_at_a_mask(layers: int, conv: int) -> None:
    model, z_BT = network(layers, conv), torch.randint(7, (8, 10), generator=torch.Generator().manual_seed(1))
    text_BTV, shadow_BTV = shadows(model, z_BT)
    plain_BTV, masked_BT = model(z_BT), z_BT == 6
    assert torch.allclose(text_BTV, plain_BTV, atol=1e-9)
    assert 0 < int(masked_BT.sum()) < masked_BT.numel()
    assert torch.allclose(shadow_BTV[masked_BT], plain_BTV[masked_BT], atol=1e-9)
    assert (shadow_BTV - plain_BTV)[~masked_BT].abs().amax(-1).min() > 1e-3


def test_a_shadow_does_not_read_its_own_token_but_all_others() -> None:
    """Not in its own layer, that is: from the second on the others have read the token, and hand on a little of it.

    A short convolution before attention hands it on in the first."""
    z_BT = torch.randint(6, (8, 10), generator=torch.Generator().manual_seed(1))
    for layers, conv, own in ((1, 0, False), (3, 0, True), (1, 3, True)):
        model = network(layers, conv)
        shadow_BTV = shadows(model, z_BT)[1]
        for i in range(10):
            other_BT = z_BT.clone()
            other_BT[:, i] = (z_BT[:, i] + 1) % 6
            moved_BT = (shadows(model, other_BT)[1] - shadow_BTV).abs().amax(-1)
            elsewhere_T = torch.arange(10) != i
            assert moved_BT[:, elsewhere_T].min() > 1e-6
            assert (moved_BT[:, i].max() > 1e-9) == own


def test_the_shadows_of_the_oracles_hide_their_own_token() -> None:
    z_BT = Z_ZT[torch.randperm(len(Z_ZT), generator=torch.Generator().manual_seed(0))]
    for model in (BayesDenoiser(TINY), Noted(TINY.vocab, TINY.length)):
        masks_BT = torch.full_like(z_BT, MASK)
        logits_BQV = model(torch.cat([z_BT, masks_BT], 1), torch.zeros(len(z_BT)), pattern="shadow")
        assert torch.equal(logits_BQV[:, :3], model(z_BT, torch.zeros(len(z_BT))))
        for i in range(3):
            hidden_BT = z_BT.clone()
            hidden_BT[:, i] = MASK
            assert torch.equal(logits_BQV[:, 3 + i], model(hidden_BT, torch.zeros(len(z_BT)))[:, i])


def votes() -> Tiny:
    """Six bits that are copies of a hidden one, each wrong with 0.1."""
    tiny = Tiny(2, 6)
    ones_S = tiny.x_ST.sum(-1)
    tiny.p_S = (0.9**ones_S * 0.1 ** (6 - ones_S) + 0.1**ones_S * 0.9 ** (6 - ones_S)).double() / 2
    return tiny


def test_revoke_takes_back_the_token_that_the_others_deny() -> None:
    tiny = votes()
    noise, z = masked_noise(tiny), [0, 0, 0, 1, 2, 2]

    def after(rule: Revoke, left: int = 3, closed: int = 0) -> list[int]:
        step = step_of(torch.tensor([z]), noise, BayesDenoiser(tiny), 0.5, 0.4, left, 5, closed)
        next_1T = rule(step, generators(0, 1))
        return [int(token) for token in next_1T[0]]

    cold = Draw(0.0)
    assert after(Revoke(0.6, 0.5, cold)) == [0, 0, 0, 2, 0, 0]  # two are written, so one may go
    assert after(Revoke(0.6, 0.05, cold)) == [0, 0, 0, 1, 0, 0]  # unlikely, but not so much
    assert after(Revoke(0.95, 0.5, cold)) == [0, 0, 0, 1, 0, 2]  # one is written, none may go
    assert after(Revoke(0.95, 0.5, cold), left=1) == [0, 0, 0, 1, 0, 0]  # the last step
    assert after(Revoke(0.6, 0.5, cold), closed=4) == [0, 0, 0, 1, 0, 0]  # what was given stays


def changes(rule: Rule, steps: int, length: int = 24, rows: int = 40, **options: Any) -> tuple[list[Frame], Tensor]:
    """Frames, and (steps + 1, rows, length) texts from the masks on."""
    sampler = DiffusionSampler(Noted(5, length), MaskedNoise(6, 5), length, rule, steps, **options)
    frames = list(sampler.steps(copies([None] * length, 5, rows), rng=generators(0, rows)))
    return frames, torch.stack([torch.full((rows, length), 5), *(frame.tokens_BT for frame in frames)])


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_revoke_goes_on_in_every_step_and_ends_before_its_budget(threshold: float) -> None:
    frames, text_NBT = changes(Revoke(threshold), 40, until_settled=1)
    masked_NBT, left_NB = text_NBT == 5, (text_NBT == 5).sum(-1)
    assert ((left_NB[1:] < left_NB[:-1]) | (left_NB[:-1] == 0)).all()
    back_NBT = masked_NBT[1:] & ~masked_NBT[:-1]
    kept_NBT = ~masked_NBT[1:] & ~masked_NBT[:-1]
    assert int(back_NBT.sum()) > 40
    assert torch.equal(text_NBT[1:][kept_NBT], text_NBT[:-1][kept_NBT])
    last = frames[-1]
    assert last.saved_B is not None
    assert int(last.saved_B.min()) > 10
    assert len(frames) == 40 - int(last.saved_B.min())
    whole_NB = left_NB == 0
    assert (whole_NB.int().argmax(0) + 1 == 40 - last.saved_B).all()  # one call more, to see that nothing moves
    tight, text_NBT = changes(Revoke(threshold), 4)
    assert len(tight) == 4
    assert not ((text_NBT[-1] == 5) & (text_NBT[-2] != 5)).any()
    assert (text_NBT[-1] != 5).all()
    assert ((text_NBT[1:-1] == 5) & (text_NBT[:-2] != 5)).any()


@pytest.mark.parametrize("word", ["linear", "cosine", "log-linear:0.2"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 4.0])
def test_planned_keeps_the_best_and_as_many_as_the_grid_says(eta: float, word: str) -> None:
    rows, steps, noise = 200, 10, MaskedNoise(6, 5, schedule.parse(word))
    z_BT = torch.randint(6, (rows, 11), generator=torch.Generator().manual_seed(2))
    for left in (8, 4, 1):
        t, s = left / steps, (left - 1) / steps
        step = step_of(z_BT, noise, Noted(5, 11), t, s, left, steps, closed=1)
        after_BT, token_BT = (
            Planned(eta)(step, generators(0, rows)),
            torch.where(z_BT == 5, Draw()(step.logp_BTV, generators(0, rows)), z_BT),
        )
        assert step.shadow_BTV is not None
        hidden_BTV = step.shadow_BTV[..., :5].log_softmax(-1)
        score_BT = hidden_BTV.gather(-1, token_BT[..., None]).squeeze(-1) * torch.where(z_BT == 5, 1.0, eta)
        alpha = float(noise.schedule.alpha(torch.tensor(s, dtype=torch.float64)))
        count = math.ceil(round(10 * alpha, 6)) if left > 1 else 10
        best_BT = score_BT[:, 1:].argsort(-1, descending=True)[:, :count] + 1
        expected_BT = torch.full_like(z_BT, 5).scatter(1, best_BT, token_BT.gather(1, best_BT))
        expected_BT[:, 0] = z_BT[:, 0]
        if eta or left == 1:
            assert torch.equal(after_BT, expected_BT)
        standing_BT = (z_BT != 5) & step.open_BT
        few_B = standing_BT.sum(-1) <= count
        lost_BT = standing_BT & (after_BT == 5)
        assert ((after_BT != 5) & step.open_BT).sum(-1).eq(count).all()
        assert bool(lost_BT[few_B].any()) == (eta > 0 and left > 1) or not few_B.any()


def test_planned_without_weight_takes_nothing_back_even_for_certain_tokens() -> None:
    """Tokens drawn with probability 1 score 0, as do those that stand at eta 0."""
    certain_BTV = torch.full((1, 8, 6), -torch.inf)
    certain_BTV[:, :, 0] = 0.0

    def sure(z_BQ: Tensor, t_B: Tensor | None = None, **_: object) -> Tensor:
        return certain_BTV.repeat(len(z_BQ), 2, 1)

    z_1T = torch.tensor([[5, 5, 5, 5, 5, 0, 0, 1]])
    for s, expected in ((0.5, [0, 5, 5, 5, 5, 0, 0, 1]), (0.6, [0, 5, 5, 5, 5, 0, 0, 1]), (0.625, [5, 5, 5, 5, 5, 0, 0, 1])):
        step = step_of(z_1T, MaskedNoise(6, 5), sure, 0.7, s, 6, 9)
        assert Planned(0.0)(step, generators(0, 1))[0].tolist() == expected, s


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_planned_without_weight_takes_nothing_back(eta: float) -> None:
    """Then it is TopScore where the grid gives every step the same share."""
    _, text_NBT = changes(Planned(eta), 8)
    back_N = ((text_NBT[1:] == 5) & (text_NBT[:-1] != 5)).sum((1, 2))
    assert (int(back_N.sum()) > 0) == (eta > 0)
    assert back_N[-1] == 0
    assert (text_NBT != 5).sum(-1).tolist() == [[3 * k] * 40 for k in range(9)]
    plain = changes(TopScore(), 8)[1]
    assert torch.equal(text_NBT, plain) == (eta == 0)


def test_planned_text_is_likelier_than_that_of_the_chain() -> None:
    """Not closer in total variation from three steps on: it seeks what is likely, and finds too much of it."""
    for steps in (2, 3, 4, 6):
        likely, chain = (float(law_S @ PEAKED.p_S) for law_S in (law_of("planner:1", steps), ancestral_law(PEAKED, steps)))
        planned_tv, chain_tv = (distance(law_S, PEAKED) for law_S in (law_of("planner:1", steps), ancestral_law(PEAKED, steps)))
        print(f"{steps} steps: mean p(x) planned {likely:.4f}, ancestral {chain:.4f}; total variation {planned_tv:.4f}, {chain_tv:.4f}")
        assert likely > chain
        assert (planned_tv < chain_tv) == (steps == 2)


WORDS: list[tuple[str, Rule]] = [
    *((f"remdm-{kind}", Remask(kind, 0.04, Draw(0.5))) for kind in KINDS),
    *((f"remdm-{kind}:0.7", Remask(kind, 0.7, Draw(0.5))) for kind in KINDS),
    ("revoke", Revoke(0.6, 0.9, Draw(0.5))),
    ("revoke:0.5", Revoke(0.5, 0.9, Draw(0.5))),
    ("planner", Planned(1.0, Draw(0.5))),
    ("planner:0", Planned(0.0, Draw(0.5))),
]


@pytest.mark.parametrize(("word", "rule"), WORDS)
def test_words(word: str, rule: Rule) -> None:
    assert registry.make(word, Draw(0.5), masked_noise(TINY)) == rule
    assert rule.revises


@pytest.mark.parametrize(
    "word",
    [
        "remdm",
        "remdm-cap:-0.1",
        "remdm-loop:1.1",
        "remdm-conf:nan",
        "remdm-rescale:x",
        "revoke:0",
        "revoke:nan",
        "planner:-1",
        "planner:inf",
    ],
)
def test_bad_words(word: str) -> None:
    with pytest.raises(InputError):
        registry.make(word, Draw(), masked_noise(TINY))
    with pytest.raises(InputError, match=r"needs masked noise|is unknown"):
        registry.make(word, Draw(), process.make({"process": "uniform"}, 4, 3))


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="remasking is one of cap, rescale, conf, loop"):
        Remask("often")
    for keep in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="keep a token must be at least 0 and at most 1"):
            Revoke(0.6, keep)
