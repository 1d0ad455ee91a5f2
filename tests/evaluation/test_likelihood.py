"""The reported number: exact where it says so, its error honest, its estimators in agreement."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from chains import noise_of
from dlm.errors import InputError
from dlm.evaluation import likelihood
from dlm.noise.masked import MaskedNoise
from dlm.noise.score import ScoreNoise
from dlm.noise.uniform import UniformNoise
from dlm.protocols import NoiseProcess
from oracle import BayesDenoiser, ClassBayes, ReplacementBayes, Tiny, dense

WRONG: dict[type, str] = {MaskedNoise: "counted", UniformNoise: "any-order"}
OF_SCORES = "score-entropy"


def _windows(tiny: Tiny, count: int, seed: int = 0) -> torch.Tensor:
    return tiny.x_ST[torch.multinomial(tiny.p_S, count, replacement=True, generator=torch.Generator().manual_seed(seed))]


MASKED, UNIFORM = MaskedNoise(4, 3), UniformNoise(4, 3)
CASES = [
    (noise, word)
    for noise in (MASKED, UNIFORM)
    for word in likelihood.ESTIMATORS
    if word not in (WRONG[type(noise)], OF_SCORES, likelihood.TWO_CLOCKS)
]


def _bayes(tiny: Tiny, noise: NoiseProcess) -> BayesDenoiser | ReplacementBayes:
    return BayesDenoiser(tiny) if noise == MASKED else ReplacementBayes(tiny, partial(dense, noise))


@pytest.mark.parametrize(("noise", "estimator"), CASES)
def test_the_bound_of_the_bayes_denoiser_is_the_entropy(noise: NoiseProcess, estimator: str) -> None:
    tiny = Tiny(3, 3, seed=1)
    windows = _windows(tiny, 4000)
    result = likelihood.evaluate(
        noise, _bayes(tiny, noise), windows, characters=windows.numel(), estimator=estimator, steps=1000, batch=500
    )
    assert result.estimator == (estimator if estimator != "auto" else WRONG[type(UNIFORM if noise == MASKED else MASKED)])
    exact = -tiny.p_S.log()[tiny.index(windows)].mean().item() / 3  # of these very windows: only Monte-Carlo error is left
    assert result.is_bound
    assert result.stderr < 0.03
    assert result.nats_per_token == pytest.approx(exact, abs=4 * result.stderr)
    assert result.bits_per_char == pytest.approx(result.nats_per_token / math.log(2))


def test_the_parts_of_classes_add_up_to_the_entropy() -> None:
    tiny = Tiny(3, 3, seed=1)
    noise, windows = noise_of("classes"), _windows(tiny, 4000)
    found = likelihood.evaluate(noise, ClassBayes(tiny, noise), windows, characters=windows.numel(), batch=500)
    exact = -tiny.p_S.log()[tiny.index(windows)].mean().item() / 3
    assert found.estimator == likelihood.TWO_CLOCKS
    assert found.nats_per_token == pytest.approx(exact, abs=4 * found.stderr)
    assert found.parts is not None
    assert sum(found.parts.values()) == pytest.approx(found.nats_per_token)
    for noise in (MASKED, UNIFORM):
        with pytest.raises(InputError, match="only noise of classes has two clocks"):
            likelihood.evaluate(noise, _bayes(tiny, noise), windows, characters=1, estimator=likelihood.TWO_CLOCKS)


def test_the_score_entropy_of_the_true_scores_is_the_entropy() -> None:
    """Scores are alpha / (1 - alpha) times the predictions at masks."""
    tiny = Tiny(3, 3, seed=1)
    bayes, windows = BayesDenoiser(tiny), _windows(tiny, 4000)

    def scores(z_BT: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        return bayes(z_BT) + ((1 - t_B) / t_B).log()[:, None, None]

    result = likelihood.evaluate(ScoreNoise(4, 3), scores, windows, characters=windows.numel(), estimator=OF_SCORES, batch=500)
    exact = -tiny.p_S.log()[tiny.index(windows)].mean().item() / 3
    assert result.estimator == OF_SCORES
    assert result.nats_per_token == pytest.approx(exact, abs=4 * result.stderr)
    with pytest.raises(InputError, match="the bound of networks of scores"):
        likelihood.evaluate(MASKED, bayes, windows, characters=windows.numel(), estimator=OF_SCORES)


@pytest.mark.parametrize(
    ("noise", "estimator", "tail"),
    [(MASKED, "any-order", 1.2), (MASKED, "continuous", 1.5), (UNIFORM, "counted", 1.5), (UNIFORM, "continuous", 3.0)],
)
def test_the_stated_error_is_the_spread_over_seeds(noise: NoiseProcess, estimator: str, tail: float) -> None:
    tiny = Tiny(3, 3, seed=2)
    bayes, windows = _bayes(tiny, noise), _windows(tiny, 100)
    runs = [likelihood.evaluate(noise, bayes, windows, characters=300, estimator=estimator, seed=seed, batch=100) for seed in range(60)]
    spread = torch.tensor([r.nats_per_token for r in runs]).std().item()
    stated = torch.tensor([r.stderr for r in runs])
    assert 0.5 * float(stated.mean()) < spread < 1.25 * float(stated.mean())  # stratified levels may lower the true error, never raise it
    assert float(stated.max()) < tail * float(stated.median())  # no run meets a weight that the others have not seen


def test_autoregressive_is_exact_and_counts_characters() -> None:
    noise, windows = MaskedNoise(4, 3), torch.zeros(5, 4, dtype=torch.long)

    def predict(z_BT: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*z_BT.shape, 4)

    result = likelihood.evaluate(noise, predict, windows, characters=40, estimator="autoregressive")
    assert result.nats_per_token == pytest.approx(math.log(3))
    assert result.stderr == 0
    assert not result.is_bound
    assert result.bits_per_char == pytest.approx(math.log2(3) / 2)


@pytest.mark.parametrize("noise", [MASKED, UNIFORM])
def test_an_estimator_of_other_noise_is_told(noise: NoiseProcess) -> None:
    with pytest.raises(InputError, match=r"only .* noise has an? .* form: use --estimator"):
        likelihood.evaluate(noise, _bayes(Tiny(), noise), Tiny().x_ST, characters=1, estimator=WRONG[type(noise)])


def test_a_single_pass_has_no_error_to_state() -> None:
    with pytest.raises(ValueError, match="2 passes"):
        likelihood.evaluate(MaskedNoise(4, 3), BayesDenoiser(Tiny()), Tiny().x_ST, characters=1, passes=1)
