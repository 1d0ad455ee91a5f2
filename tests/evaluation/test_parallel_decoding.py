"""What parallel decoding loses, against enumerated distributions."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from conftest import Dlm, make_model
from dlm.errors import InputError
from dlm.evaluation.order_cost import ancestral_price, best_price, best_steps, curve_rows, entropy_curve, equal_steps, price, smooth
from dlm.evaluation.parallel_decoding import curse, total_correlation
from dlm.noise.masked import MaskedNoise
from dlm.noise.uniform import UniformNoise
from dlm.protocols import RNG
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.diffusion.revising import PredictorCorrector
from dlm.sampling.diffusion.unmasking import Ancestral, FirstHitting, Threshold, TopScore
from oracle import BayesDenoiser, Tiny

TINY = Tiny(3, 4, seed=3, concentration=0.3)
NOISE = MaskedNoise(4, 3)
Where = Sequence[int]


def entropy(which: Where) -> float:
    """Nats of the tokens at these positions together."""
    key_S = (TINY.x_ST[:, list(which)] * 3 ** torch.arange(len(which))).sum(-1)
    p = torch.zeros(3 ** len(which), dtype=torch.float64).index_add(0, key_S, TINY.p_S)
    return float(torch.special.entr(p).sum())


def loss(chosen: Where, known: Where = ()) -> float:
    """Total correlation of the chosen given the known, mean over texts."""
    return sum(entropy([*known, i]) - entropy(known) for i in chosen) - (entropy([*known, *chosen]) - entropy(known))


def h_exact() -> Tensor:
    everywhere = range(TINY.length)
    cases = ([(set(c), i) for c in itertools.combinations(everywhere, k) for i in everywhere if i not in c] for k in everywhere)
    means = [sum(entropy([*c, i]) - entropy([*c]) for c, i in case) / len(case) for case in map(list, cases)]
    return torch.tensor(means, dtype=torch.float64)


def expected(steps: Where) -> float:
    """Loss of a run in random order, by enumeration of the orders."""
    total, orders = 0.0, list(itertools.permutations(range(TINY.length)))
    for order in orders:
        begin = 0
        for size in steps:
            total += loss(order[begin : begin + size], order[:begin]) / len(orders)
            begin += size
    return total


def texts(count: int, seed: int = 0) -> Tensor:
    return TINY.x_ST[torch.multinomial(TINY.p_S, count, replacement=True, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(
    ("chosen", "known"), [((0, 1), ()), ((0, 2, 3), ()), ((0, 1, 2, 3), ()), ((1, 3), (0, 2)), ((0, 3), (1,)), ((2,), ())]
)
def test_total_correlation_is_the_enumerated_one(chosen: Where, known: Where) -> None:
    z_BT = torch.full_like(x_BT := texts(400), 3)
    z_BT[:, list(known)] = x_BT[:, list(known)]
    chosen_BT = torch.zeros_like(z_BT, dtype=torch.bool)
    chosen_BT[:, list(chosen)] = True
    before_BT = z_BT.clone()
    bayes = BayesDenoiser(TINY)
    nats_B, count_B = total_correlation(NOISE, bayes, z_BT, chosen_BT, torch.Generator().manual_seed(1), draws=2, batch=800)
    assert torch.equal(z_BT, before_BT)
    assert (count_B == len(chosen)).all()
    assert (nats_B >= 0).all()
    assert bayes.calls == (len(chosen) if len(chosen) > 1 else 0)
    error = float(nats_B.std()) / math.sqrt(len(nats_B))
    assert error < 0.025
    assert float(nats_B.mean()) == pytest.approx(loss(chosen, known), abs=4 * error + 1e-12)


def test_rows_with_smaller_sets_drop_out_and_do_not_disturb() -> None:
    z_BT = torch.full((300, 4), 3)
    chosen_BT = torch.tensor([[True, True, True, True], [True, True, False, False], [False, False, False, False]]).repeat(100, 1)
    nats_B, count_B = total_correlation(NOISE, BayesDenoiser(TINY), z_BT, chosen_BT, torch.Generator().manual_seed(0), draws=4)
    assert count_B[:3].tolist() == [4, 2, 0]
    assert (nats_B[2::3] == 0).all()
    for row, exact in ((0, loss(range(4))), (1, loss((0, 1)))):
        each = nats_B[row::3]
        assert float(each.mean()) == pytest.approx(exact, abs=4 * float(each.std()) / 10)


def test_a_random_subset_of_the_chosen_is_the_mean_over_subsets() -> None:
    z_BT, chosen_BT = torch.full((600, 4), 3), torch.tensor([True, True, False, True]).expand(600, 4)
    rng, two_B = torch.Generator().manual_seed(0), torch.full((600,), 2)
    nats_B, count_B = total_correlation(NOISE, BayesDenoiser(TINY), z_BT, chosen_BT, rng, count_B=two_B)
    exact = sum(loss(pair) for pair in itertools.combinations((0, 1, 3), 2)) / 3
    error = float(nats_B.std()) / math.sqrt(600)
    assert (count_B == 2).all()
    assert error < 0.025
    assert float(nats_B.mean()) == pytest.approx(exact, abs=4 * error)


def test_a_visible_position_is_told() -> None:
    with pytest.raises(InputError, match="visible"):
        total_correlation(NOISE, BayesDenoiser(TINY), texts(2), torch.ones(2, 4, dtype=torch.bool), torch.Generator())


def test_the_price_of_one_by_one_and_of_all_at_once() -> None:
    h_WT = torch.rand(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(price(h_WT, [1] * 9), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(price(h_WT, [9]), 9 * h_WT[:, 0] - h_WT.sum(-1))
    by_hand = 2 * h_WT[:, 2] - h_WT[:, 3] - h_WT[:, 4]  # the step of three that begins with two known
    assert torch.allclose(price(h_WT, [1, 1, 3, 1, 1, 1, 1]), by_hand)


@pytest.mark.parametrize("steps", [(1, 1, 1, 1), (2, 2), (1, 3), (3, 1), (2, 1, 1), (4,)])
def test_the_curve_prices_random_sets_exactly(steps: Where) -> None:
    assert float(price(h_exact(), steps)) == pytest.approx(expected(steps), abs=1e-9)


def test_the_measured_curve_is_the_enumerated_one() -> None:
    told: list[int] = []
    curve = entropy_curve(NOISE, BayesDenoiser(TINY), texts(1000), batch=400, progress=told.append)
    assert curve.known_K.tolist() == [0, 1, 2, 3]
    assert sum(told) == curve_rows(1000, 4)
    for values_WK in (curve.entropy_WK, curve.text_WK):
        error_K = values_WK.std(0) / math.sqrt(1000)
        assert (error_K < 0.03).all()
        assert ((values_WK.mean(0) - h_exact()).abs() <= 4 * error_K + 1e-9).all()
        assert torch.allclose(curve.every(values_WK), values_WK)
    assert float(curve.text_WK.std()) > float(curve.entropy_WK.std())  # two different things


def test_between_measured_counts_lies_a_line() -> None:
    curve = entropy_curve(MaskedNoise(4, 3), lambda z_BT, t_B: torch.randn(*z_BT.shape, 4), torch.zeros(2, 9, dtype=torch.long), levels=3)
    assert curve.known_K.tolist() == [0, 4, 8]
    h_WT = curve.every(curve.text_WK)
    assert torch.allclose(h_WT[:, [0, 4, 8]], curve.text_WK)
    assert torch.allclose(h_WT[:, 1], 0.75 * h_WT[:, 0] + 0.25 * h_WT[:, 4])
    assert torch.allclose(h_WT[:, 6], (h_WT[:, 4] + h_WT[:, 8]) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_steps_are_those_of_brute_force(seed: int) -> None:
    h_T = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
    for count in range(1, 9):
        cuts = ((0, *inner, 8) for inner in itertools.combinations(range(1, 8), count - 1))
        least = min(float(price(h_T, [b - a for a, b in itertools.pairwise(cut)])) for cut in cuts)
        found = best_steps(h_T, count)
        assert len(found) == count
        assert float(price(h_T, found)) == pytest.approx(least, abs=1e-12)
        assert float(price(h_T, found)) <= float(price(h_T, equal_steps(8, count))) + 1e-12


def test_the_best_price_is_paid_on_other_windows() -> None:
    h_WT = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)).double()
    plan = best_steps(smooth(h_WT[1::2].mean(0)), 3)
    assert torch.allclose(best_price(h_WT, 3)[::2], price(h_WT[::2], plan))
    with pytest.raises(InputError, match="2 windows"):
        best_price(h_WT[:1], 3)


def test_a_smooth_curve_keeps_what_is_smooth() -> None:
    x_T = torch.linspace(0, 2, 30, dtype=torch.float64)
    h_T = 3 - x_T + 0.3 * x_T**2 - 0.1 * x_T**4
    assert torch.allclose(smooth(h_T), h_T)
    assert torch.allclose(smooth(h_T[:3]), h_T[:3])
    zigzag_T = 0.5 * (-1.0) ** torch.arange(30)
    assert float((smooth(h_T + zigzag_T) - h_T).abs().max()) < 0.2


def test_equal_steps_share_evenly() -> None:
    assert equal_steps(10, 3) == [4, 3, 3]
    assert equal_steps(8, 8) == [1] * 8
    assert equal_steps(7, 1) == [7]
    for bad in (0, 11):
        with pytest.raises(InputError, match="1 to 10 steps"):
            equal_steps(10, bad)
    for sizes in ([4, 4], [4, 6, 0], [11, -1], []):
        with pytest.raises(InputError, match="add up to the 10"):
            price(torch.rand(10), sizes)


@dataclass(frozen=True)
class FromTheEnds:
    """Writes the outer masks first, then the inner two."""

    revises: ClassVar[bool] = False

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        outer_T = torch.tensor([True, False, False, True])
        now_BT = step.open_BT & (outer_T | ~(step.open_BT & outer_T).any(-1, keepdim=True))
        return torch.where(now_BT, 0, step.z_BT)


@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("rule", [Ancestral(), FromTheEnds()], ids=["ancestral", "own"])
def test_a_run_loses_what_enumeration_says(rule: Ancestral | FromTheEnds, calls: int) -> None:
    exact = expected((2, 2)) if isinstance(rule, Ancestral) else loss((0, 3)) + loss((1, 2), (0, 3))
    found = curse(NOISE, BayesDenoiser(TINY), texts(1000), rule, 2, calls=calls, batch=500)
    assert found.steps == 2
    assert found.length == 4
    assert len(found.nats_W) == 1000
    nats, bits = found.nats_per_text, found.bits_per_char(2.0)
    assert 0 < nats.band95 < 0.06
    assert nats.value == pytest.approx(exact, abs=2 * nats.band95)
    assert found.nats_per_token.value == pytest.approx(nats.value / 4)
    assert bits.value == pytest.approx(nats.value / 8 / math.log(2))
    assert bits.band95 == pytest.approx(nats.band95 / 8 / math.log(2))


def test_a_run_in_uneven_steps_counts_every_step_once() -> None:
    found = curse(NOISE, BayesDenoiser(TINY), texts(1000), Ancestral(), 3, calls=8, batch=500)
    assert found.steps == 2
    assert found.nats_per_text.value == pytest.approx(expected((2, 2)), abs=2 * found.nats_per_text.band95)


def test_one_token_a_step_loses_nothing_unless_the_rule_takes_more() -> None:
    windows_WT = texts(200)
    for rule in (Ancestral(), TopScore()):
        assert curse(NOISE, BayesDenoiser(TINY), windows_WT, rule, 1).nats_per_text.value == 0
    assert curse(NOISE, BayesDenoiser(TINY), windows_WT, Threshold(0.4), 1).nats_per_text.value > 0.01
    assert curse(NOISE, BayesDenoiser(TINY), windows_WT, Threshold(1.0), 1).nats_per_text.value < 1e-6


def test_what_cannot_be_measured_is_told() -> None:
    for rule in (PredictorCorrector(), FirstHitting()):
        with pytest.raises(InputError, match="write each token once and several in a step"):
            curse(NOISE, BayesDenoiser(TINY), texts(2), rule, 2)
    for size in (0, 5):
        with pytest.raises(InputError, match=rf"lie in 1 \.\. 4.*got {size}"):
            curse(NOISE, BayesDenoiser(TINY), texts(2), Ancestral(), size)
    with pytest.raises(InputError, match="masked noise"):
        entropy_curve(UniformNoise(4, 3), BayesDenoiser(TINY), texts(2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="2 levels"):
        entropy_curve(NOISE, BayesDenoiser(TINY), texts(2), levels=1)


def test_the_verb_prints_a_table_a_picture_and_json(dlm: Dlm, masked_dir: Path, text_file: Path, tmp_path: Path) -> None:
    words: tuple[str, ...] = ("curse", str(masked_dir), "--data", str(text_file), "--split", "all", "--max-windows", "3")
    words += ("--tokens-per-step", "8,1,32", "--sampler", "ancestral,topk,factor:2")
    code, out, _ = dlm(*words, "--json", "--plot", "curse.png")
    record = json.loads(out.splitlines()[-1])
    assert code == 0
    assert (tmp_path / "curse.png").stat().st_size > 10_000
    assert [(row["tokens_per_step"], row["steps"]) for row in record["rows"]] == [(1, 32), (2, 16), (4, 8), (8, 4), (16, 2), (32, 1)]
    one, two, _, eight, _, whole = record["rows"]
    assert two["measured"] == {}
    assert two["equal"] != eight["equal"]
    assert abs(one["equal"]["mean"]) < 1e-9
    assert one["measured"]["ancestral"] == one["measured"]["topk"] == {"mean": 0, "band95": 0}
    h_K = record["curve"]["entropy"]["mean"]
    assert len(h_K) == 32
    assert whole["equal"]["mean"] == pytest.approx(h_K[0] - sum(h_K) / 32)
    assert all(eight["measured"][word]["mean"] > 0 for word in ("ancestral", "topk", "factor:2"))
    assert record["characters_per_token"] == 1
    assert sum(record["best_steps"]) == 32
    assert record["windows"] == 3
    code, out, _ = dlm(*words[:-4], "--tokens-per-step", "16", "--sampler", "ancestral")
    assert code == 0
    assert re.search(r"^\s*16\s+2\s", out, re.M)
    assert "best sizes of 2 steps: " in out


@pytest.mark.slow
def test_the_verb_reads_the_bundled_model(dlm: Dlm, text_file: Path) -> None:
    words = ("--data", str(text_file), "--split", "all", "--max-windows", "2", "--tokens-per-step", "1", "--sampler", "ancestral")
    code, out, _ = dlm("curse", "shakespeare-mask", *words, "--json")
    record = json.loads(out.splitlines()[-1])
    assert code == 0
    assert record["window"] == 256
    assert 1 < record["bound"]["mean"] < 4
    assert len(record["best_steps"]) == 256
    assert record["curve"]["entropy"]["mean"][0] > record["curve"]["entropy"]["mean"][-1] + 0.5  # neighbours tell something


def test_bad_input_gets_one_line(dlm: Dlm, masked_dir: Path, autoregressive_dir: Path, text_file: Path, tmp_path: Path) -> None:
    make_model(noise={"process": "uniform"}).save_pretrained(tmp_path / "uniform")
    text = ("--data", str(text_file), "--split", "all")
    for other in (autoregressive_dir, tmp_path / "uniform"):
        assert "no masked diffusion model" in dlm.told("curse", str(other), *text)
    model = ("curse", str(masked_dir), *text)
    for sizes in ("0", "4,-1", "33"):
        assert "lie in 1 .. 32" in dlm.told(*model, "--tokens-per-step", sizes)
    assert "whole numbers" in dlm.told(*model, "--tokens-per-step", "two")
    assert "'magic' is unknown" in dlm.told(*model, "--sampler", "magic")
    assert "PredictorCorrector" in dlm.told(*model, "--sampler", "predictor-corrector:1")
    assert "2 windows" in dlm.told(*model, "--max-windows", "1")
    assert "no data" in dlm.told("curse", str(masked_dir))
    assert ".png" in dlm.told(*model, "--plot", "curse.txt")


def test_the_price_of_random_steps_is_the_mean_over_all_of_them() -> None:
    h_T = torch.tensor([2.0, 1.5, 0.7, 0.2], dtype=torch.float64)
    exact = 0.0
    for steps in itertools.product(range(3), repeat=4):  # the step of every position
        exact += float(price(h_T, [steps.count(s) for s in range(3) if s in steps])) / 3**4
    assert float(ancestral_price(h_T, 3, draws=4000)) == pytest.approx(exact, abs=0.02)
    assert float(ancestral_price(h_T, 10**6)) < 1e-3
