from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import make_model
from dlm.errors import InputError
from dlm.evaluation import generative
from dlm.language_model import LanguageModel
from dlm.model_scheduling import search, sensitivity
from dlm.model_scheduling.cost import CallCost, call_costs, cost, expected_calls
from dlm.model_scheduling.outcome import Outcome
from dlm.model_scheduling.plan import ModelSchedule
from dlm.model_scheduling.trial import Trial
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.noise.masked import MaskedNoise
from dlm.sampling.draw import generators
from dlm.workflows.model_pair import ModelPair, Trials

PRICES = {"H": CallCost(1200.0, 50.0, 16), "M": CallCost(800.0, 50.0, 16), "L": CallCost(400.0, 50.0, 16)}
BLOCKS = {key: price.blocks for key, price in PRICES.items()}


@pytest.mark.parametrize("sizes", [{}, {"mlp": "swiglu", "kv_heads": 2, "heads": 4}, {"layers": 1, "head_dim": 24}])
def test_flops_are_those_that_torch_counts(sizes: dict[str, Any]) -> None:
    config = TransformerConfig(vocab_size=37, window=24, **({"width": 48, "layers": 3, "heads": 4} | sizes))
    with torch.device("meta"):  # on a CPU the counter takes fused attention for free
        network, z_BT = Transformer(config), torch.zeros(3, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(z_BT)
    blocks, head = config.forward_flops()
    assert counter.get_total_flops() == 3 * 24 * (blocks + head)


def test_the_papers_saving_by_each_convention() -> None:
    """12 blocks against 4, width 768, 1,024 tokens of a vocabulary of 50,258: 16.7 % of blocks, 12.1 % with the head."""
    deep = TransformerConfig(vocab_size=50_258, window=1024, layers=12, heads=12, width=768)
    networks = {"H": type("N", (), {"config": deep})(), "L": type("N", (), {"config": deep.with_(layers=4)})()}
    found = cost(ModelSchedule.parse("L125 H750 L125"), call_costs(networks, 1024), 1000)
    assert found.saved_blocks == pytest.approx(0.25 * (1 - 4 / 12))
    assert found.saved_with_head == pytest.approx(0.121, abs=5e-4)
    assert found.calls == pytest.approx(641, abs=0.5)  # steps in which anything is unmasked
    assert found.saved_executed > found.saved_with_head  # each position is given a head once
    assert sum(expected_calls(1000, 128)) == pytest.approx(120, abs=0.5)


def test_one_multiplier_prices_a_ladder() -> None:
    kl = {"H": [0.0] * 6, "M": [0.01, 0.02, 0.2, 0.3, 0.2, 0.1], "L": [0.02, 0.1, 0.5, 0.6, 0.5, 0.3]}
    for saved in (0.0, 0.1, 0.25, 0.4, 0.66):
        found = search.by_kl(kl, BLOCKS, saved).each(6)
        assert sum(BLOCKS[key] for key in found) <= (1 - saved) * 1200 * 6 + 1e-6
        best = min(  # all 3^6 ways
            (
                sum(kl[key][j] for j, key in enumerate(keys))
                for keys in ways(6)
                if sum(BLOCKS[k] for k in keys) <= (1 - saved) * 7200 + 1e-6
            ),
        )
        mine = sum(kl[key][j] for j, key in enumerate(found))
        assert mine <= best + 0.11  # within one segment of the knapsack's optimum
    with pytest.raises(InputError, match=r"saves 66\.7% when it takes every step"):
        search.by_kl(kl, BLOCKS, 0.7)


def ways(segments: int) -> list[tuple[str, ...]]:
    import itertools

    return list(itertools.product("HML", repeat=segments))


def test_steps_and_models_are_weighed_in_one_currency() -> None:
    kl, calls = {"H": [0.0] * 4, "L": [0.01, 0.2, 0.3, 0.4]}, {64: 60.0, 32: 32.0, 16: 16.0}
    blocks = {"H": 3.0, "L": 1.0}
    # light steps are dear: take half the steps
    assert search.jointly(kl, blocks, {64: 0.1, 32: 0.3, 16: 5.0}, calls, 100, 0.4)[:2] == (32, ModelSchedule.parse("H"))
    # fewer steps are dear: let the light model begin
    steps, schedule, nats = search.jointly(kl, blocks, {64: 0.1, 32: 30.0, 16: 90.0}, calls, 100, 1 / 6)
    assert (steps, str(schedule)) == (64, "L0.25 H0.75")
    assert nats == pytest.approx(0.1 + 100 * 0.01 / 4)
    # both
    assert search.jointly(kl, blocks, {64: 0.1, 32: 0.3, 16: 50.0}, calls, 100, 0.55)[:2] == (32, ModelSchedule.parse("L0.25 H0.75"))
    with pytest.raises(InputError, match=r"nothing here saves 99\.0%"):
        search.jointly(kl, blocks, {64: 0.1, 32: 0.3, 16: 50.0}, calls, 100, 0.99)


def test_path_kl_does_not_depend_on_how_a_schedule_is_cut() -> None:
    kl = {"H": [0.0] * 4, "L": [0.1, 0.2, 0.3, 0.4]}
    assert search.path_kl(ModelSchedule.parse("L0.5 H0.5"), kl, 100) == pytest.approx(100 * (0.1 + 0.2) / 4)
    assert search.path_kl(ModelSchedule.parse("L0.25 L0.25 H0.5"), kl, 100) == pytest.approx(7.5)
    assert search.path_kl(ModelSchedule.parse("L0.125 H0.875"), kl, 100) == pytest.approx(100 * 0.1 / 8)


def test_exhaustive_has_every_schedule_once() -> None:
    found = search.exhaustive(8, 2)
    assert len(found) == len({str(schedule) for schedule in found}) == 28
    assert all(schedule.share("L") == pytest.approx(0.25) for schedule in found)
    with pytest.raises(InputError, match="fewer segments"):
        search.exhaustive(24, 12)


def outcome(word: str, first: int, last: int) -> Outcome:
    """Bits of a schedule: its number of light eighths, and noise that the seeds share."""
    light = ModelSchedule.parse(word).each(8)
    bits = [sum(2.0**-j for j, key in enumerate(light) if key == "L") + (seed * 7919 % 13) / 100 for seed in range(first, last)]
    return Outcome(word, (first, last), {"bits": bits}, 1.0, 1.0, 1.0, {"H": 1.0})


def test_halving_ends_with_the_best() -> None:
    tried = search.exhaustive(8, 2)
    outcomes = list(search.halving(outcome, tried, texts=16, rounds=3, seed=5))
    assert outcomes[-1].schedule == "H0.75 L0.25"
    assert outcomes[-1].seeds == (5, 21)
    assert sum(one.seeds == (5, 9) for one in outcomes) == 28


def test_paired_differences_see_through_the_noise() -> None:
    heavy, light = outcome("H0.5 H0.5", 0, 40), outcome("H0.875 L0.125", 0, 40)
    paired = light.against(heavy, "bits")
    assert paired.value == pytest.approx(2.0**-7)
    assert paired.band95 == pytest.approx(0, abs=1e-9)
    assert light.mean("bits").band95 > 0.01


def pair(layers: int = 1) -> tuple[LanguageModel, LanguageModel]:
    heavy, light = make_model(window=16, context=0), make_model(window=16, context=0, layers=layers)
    heavy.introduce(light, "small")
    return heavy, light


def trial_of(heavy: LanguageModel, ledger: Path | None = None, steps: int = 16) -> Trial:
    judge = make_model("autoregressive", window=16, context=0)
    return Trials(ModelPair.of(heavy, "small"), judge, ledger=ledger)(steps)


def test_a_trial_counts_what_happens() -> None:
    heavy, _ = pair()
    trial = trial_of(heavy)
    alone, mixed = trial("H", 0, 6), trial("L0.5 H0.5", 0, 6)
    assert alone.calls["L"] == 0
    assert mixed.calls["L"] > 0
    assert alone.calls["H"] == pytest.approx(mixed.calls["H"] + mixed.calls["L"])  # which positions move when is the same
    assert alone.head == 6 * trial.prices["H"].head  # every position once
    assert mixed.saved(alone) == pytest.approx(
        mixed.calls["L"] / alone.calls["H"] * (1 - trial.prices["L"].blocks / trial.prices["H"].blocks)
    )
    assert alone.calls["H"] < 16  # steps in which nothing moves are not taken


def test_a_trial_writes_what_generate_writes() -> None:
    heavy, _ = pair()
    judge = make_model("autoregressive", window=16, context=0)
    texts = heavy.generate(["", ""], length=16, seed=3, steps=16, schedule="L0.5 H0.5", light="small")
    expected_N = generative.judge_bits_each(judge.noise, judge.predict, texts[0].trajectory.current_BT)
    assert trial_of(heavy)("L0.5 H0.5", 3, 5).figures["bits"] == pytest.approx(expected_N.tolist())


def test_a_model_that_was_trained_again_is_measured_again(tmp_path: Path) -> None:
    """By its weights, which its name does not tell; a line without them is not found either."""
    heavy, light = pair()
    ledger = tmp_path / "trials.jsonl"
    trial_of(heavy, ledger)("L0.5 H0.5", 0, 3)
    line = json.loads(ledger.read_text())
    assert line["settings"].pop("weights").keys() == {"H", "L", "judge"}
    with torch.no_grad():
        light.network.head.weight[0, 0] += 1
    trial_of(heavy, ledger)("L0.5 H0.5", 0, 3)
    assert len(ledger.read_text().splitlines()) == 2
    ledger.write_text(json.dumps(line) + "\n")
    trial_of(heavy, ledger)("L0.5 H0.5", 0, 3)
    assert len(ledger.read_text().splitlines()) == 2


def test_the_ledger_is_not_measured_again(tmp_path: Path) -> None:
    heavy, light = pair()
    ledger = tmp_path / "trials.jsonl"
    first = trial_of(heavy, ledger)("L0.5 H0.5", 0, 3)
    with ledger.open("a") as file:
        file.write('{"settings": {"hea')  # a search that was killed
    again, others = trial_of(heavy, ledger), trial_of(heavy, ledger, steps=8)
    with torch.no_grad():
        for parameter in light.network.parameters():
            parameter.fill_(torch.nan)  # would be noticed
    assert again("L0.5 H0.5", 0, 3) == first
    with pytest.raises(InputError, match="nan"):
        others("L0.5 H0.5", 0, 3)  # other settings: measured


def test_a_model_has_no_gap_to_itself() -> None:
    heavy = make_model(window=16, context=0)
    x_WT = torch.randint(0, heavy.tokenizer.vocab_size, (6, 16), generator=torch.Generator().manual_seed(0))
    assert isinstance(heavy.noise, MaskedNoise)
    found = sensitivity.on_text(heavy.noise, {"H": heavy.predict, "L": heavy.predict}, x_WT, segments=4)
    assert found.kl_WJ["L"].abs().max() < 1e-6
    assert found.gap_WJ("L").abs().max() == 0
    assert found.kl()["H"] == [0.0] * 4
    assert not found.kl_WJ["L"].isnan().any()


def test_the_states_of_a_run_are_those_that_it_came_by() -> None:
    heavy, light = pair()
    assert isinstance(heavy.noise, MaskedNoise)
    frames = list(heavy.sampler(steps=16).steps(heavy.canvas([""] * 5, length=16), rng=generators(0, 5)))
    models = {"H": heavy.predict, "L": light.predict}
    found = sensitivity.on_trajectories(heavy.noise, models, frames, segments=4)
    assert found.kl_WJ["L"].shape == (5, 4)
    assert (found.kl_WJ["L"][~found.kl_WJ["L"].isnan()] > 0).all()
    assert not found.kl_WJ["L"][:, 0].isnan().any()  # every run begins
    # the first state of every run is all masks: with one segment a step the KL there is known
    z_BT = torch.full((1, 16), heavy.tokenizer.mask_id)
    begin = sensitivity.on_trajectories(heavy.noise, models, frames[:1], segments=4).kl_WJ["L"][:, 0]
    t_B = torch.ones(1, dtype=torch.float64)
    expected = heavy.noise.kl(heavy.predict(z_BT, t_B), light.predict(z_BT, t_B), z_BT).mean()
    moved_B = (frames[0].tokens_BT != heavy.tokenizer.mask_id).any(-1)
    torch.testing.assert_close(begin[moved_B], expected.double().expand(int(moved_B.sum())), atol=1e-6, rtol=1e-4)


class Watched(type(Path())):  # type: ignore[misc]
    """A path that counts how often its file is read."""

    reads = 0

    def read_text(self, *args: Any, **named: Any) -> str:
        Watched.reads += 1
        return str(super().read_text(*args, **named))


def test_the_ledger_is_read_once(tmp_path: Path) -> None:
    heavy, _ = pair()
    ledger = Watched(tmp_path / "trials.jsonl")
    trial_of(heavy, ledger)("L0.5 H0.5", 0, 3)
    Watched.reads = 0
    trial = trial_of(heavy, ledger)
    trial("L0.5 H0.5", 0, 40)  # three batches
    trial("L0.5 H0.5", 0, 3)
    assert Watched.reads == 1
    assert len(ledger.read_text().splitlines()) == 4


def test_the_ledger_reads_lines_without_a_format_and_tells_a_later_one(tmp_path: Path) -> None:
    heavy, _ = pair()
    path = tmp_path / "trials.jsonl"
    first = trial_of(heavy, path)("H", 0, 3)
    line = json.loads(path.read_text())
    assert line.pop("format") == 1
    path.write_text(json.dumps(line) + "\n")
    assert trial_of(heavy, path)("H", 0, 3) == first
    assert len(path.read_text().splitlines()) == 1
    path.write_text(json.dumps(line | {"format": 2}) + "\n")
    with pytest.raises(InputError, match="has format 2"):
        trial_of(heavy, path)


def measured(word: str, bits: float, blocks: float) -> Outcome:
    return Outcome(word, (0, 2), {"bits": [bits, bits]}, blocks, 1.0, 1.0, {"H": 1.0})


@pytest.mark.parametrize("way", ["exhaustive", "halving"])
def test_a_winner_saves_what_was_asked(way: str) -> None:
    """H alone writes the best text and saves nothing; by chance no schedule saved quite what it was planned to."""
    kl = {"H": [0.0] * 4, "L": [0.01, 0.2, 0.3, 0.4]}
    plan = search.Search.plan(way, kl, {"H": 4.0, "L": 1.0}, 0.35, steps=8, tokens=16, count=4)
    outcomes = {"H1.0": measured("H1.0", 1.0, 4.0)} | {str(one): measured(str(one), 2.0 + i, 3.0) for i, one in enumerate(plan.tried)}
    assert plan.winner(outcomes, 0.35) == str(plan.tried[0])
    outcomes[str(plan.tried[-1])] = measured(str(plan.tried[-1]), 9.0, 2.0)
    assert plan.winner(outcomes, 0.35) == str(plan.tried[-1])


def test_the_winner_of_a_joint_search_is_the_row_with_its_number_of_steps() -> None:
    """Where H alone in fewer steps is best, H alone in all steps saves nothing."""
    kl = {"H": [0.0] * 4, "L": [9.0] * 4}
    plan = search.Search.plan("joint", kl, {"H": 4.0, "L": 1.0}, 0.35, steps=64, tokens=64, count=4, price=lambda steps: 1.0)
    assert str(plan.best) == "H1.0"
    assert plan.taken < 64
    assert plan.winner({"H1.0": measured("H1.0", 1.0, 4.0)}, 0.35) == f"H1.0, {plan.taken} steps"
