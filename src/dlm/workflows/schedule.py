"""Which model takes which denoising step (2604.02340): the cost of a schedule, its sensitivity, and the best one by search.

`dlm.schedule` is this module. A schedule is written `L125 H750 L125`, in shares as `L0.5 H0.5`, or as a shape: `sandwich:0.25`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlm.errors import InputError
from dlm.evaluation.statistics import Mean, pareto_front, spearman
from dlm.model_scheduling import search as ways
from dlm.model_scheduling import sensitivity as measure
from dlm.model_scheduling.cost import ScheduleCost
from dlm.model_scheduling.cost import cost as count_flops
from dlm.model_scheduling.outcome import Outcome
from dlm.model_scheduling.plan import HEAVY, ModelSchedule
from dlm.model_scheduling.saved import SavedSchedule
from dlm.sampling.draw import generators
from dlm.workflows.inputs import FORMAT, Counter, Model, Progress, Text, fields_of, silent, told
from dlm.workflows.model_pair import Light, ModelPair, Trials

PLANNED = ("ancestral", "first-hitting")  # samplers whose order no logit decides


@dataclass(frozen=True)
class CostReport:
    """FLOPs of one text of `window` tokens under a schedule, by three conventions."""

    schedule: str
    steps: int
    window: int
    cost: ScheduleCost

    def record(self) -> dict[str, object]:
        """As `dlm schedule cost --json` prints it."""
        return {"format": FORMAT, "schedule": self.schedule, "steps": self.steps} | self.cost.record()


@told
def cost(heavy: Model, light: Light, schedule: str | ModelSchedule, *, steps: int | None = None) -> CostReport:
    """FLOPs by blocks alone, with the output head, and of the forward passes that happen.

    steps: denoising steps, by default those that the schedule counts, else one for each token. InputError for models that do not fit.
    """
    pair = ModelPair.of(heavy, light)
    plan = schedule if isinstance(schedule, ModelSchedule) else ModelSchedule.parse(schedule)
    taken = plan.steps or steps or pair.lm.window
    return CostReport(str(plan), taken, pair.lm.window, count_flops(plan, pair.prices, taken))


@dataclass(frozen=True)
class SensitivityReport:
    """text, runs: loss and KL by segment of the steps, on noised text and on states that H comes by.

    swap: bits per token that a text loses where a light model takes one part of the steps alone, by key and part.
    """

    heavy: str
    light: str
    data: str
    windows: int
    segments: int
    sampler: str
    seed: int
    text: measure.Sensitivity
    runs: measure.Sensitivity
    swap: Mapping[str, Sequence[Mean]]

    @property
    def lights(self) -> list[str]:
        """The keys of the light models."""
        return list(self.text.kl_WJ)

    def record(self) -> dict[str, object]:
        """As `dlm schedule sensitivity --json` prints it."""
        swap = {key: [mean.record() for mean in means] for key, means in self.swap.items()}
        return {"format": FORMAT} | fields_of(self) | {"text": _curves(self.text), "runs": _curves(self.runs), "swap": swap}


def _curves(found: measure.Sensitivity) -> dict[str, object]:
    return {name: {key: curve.record() for key, curve in curves.items()} for name, curves in found.curves().items()}


@told
def sensitivity(
    heavy: Model,
    light: Light,
    *,
    data: str | Path | None = None,
    split: str = "val",
    max_windows: int = 64,
    segments: int = 16,
    sampler: str = "ancestral",
    steps: int | None = None,
    samples: int = 16,
    swap: int = 0,
    judge: Model = "shakespeare-ar",
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> SensitivityReport:
    """Loss gap and KL(H || light) of each segment of the steps, on noised text and on H's own runs.

    data: by default the text that H was trained on; samples: texts that H writes; swap: also let the light model take one of so many
    parts of the steps, write and judge. progress counts rows that are read. InputError for models that do not fit one another.
    """
    pair = ModelPair.of(heavy, light, device)
    lm, noise, predict = pair.lm, pair.noise, measure.predictors(pair.networks)
    text = Text.read(lm, data, split=split, max_windows=max_windows)
    taken, lights = steps or lm.window, list(pair.light)
    count = Counter(progress, (len(text.windows_WT) + samples) * segments + (1 + swap * len(lights)) * samples * taken * bool(swap))
    on_text = measure.on_text(noise, predict, text.windows_WT, segments=segments, seed=seed, progress=count.add)
    canvas = lm.canvas([""] * samples, length=lm.window).to(lm.network.device)
    frames = lm.sampler(sampler=sampler, steps=steps).steps(canvas, rng=generators(seed, samples))
    begun = count.done
    written_only = sampler not in PLANNED
    on_runs = measure.on_trajectories(noise, predict, frames, segments=segments, written_only=written_only, progress=count.add)
    count.add(begun + samples * segments - count.done)  # a run has no step in some segments
    swaps = _swaps(Trials(pair, judge, sampler=sampler), lights, swap, taken, (seed, seed + samples), count) if swap else {}
    return SensitivityReport(
        lm.name, pair.words, text.source, len(text.windows_WT), segments, sampler, seed, text=on_text, runs=on_runs, swap=swaps
    )


def _swaps(trials: Trials, lights: Sequence[str], parts: int, steps: int, seeds: tuple[int, int], count: Counter) -> dict[str, list[Mean]]:
    """Bits per token against H alone, for each light model in each part of the steps alone."""
    trial, rows = trials(steps), (seeds[1] - seeds[0]) * steps
    alone = trial(HEAVY, *seeds)
    count.add(rows)
    found: dict[str, list[Mean]] = {key: [] for key in lights}
    for key in lights:
        for part in range(parts):
            schedule = ModelSchedule.of([key if i == part else HEAVY for i in range(parts)], shares=True)
            found[key].append(trial(str(schedule), *seeds).against(alone, "bits"))
            count.add(rows)
    return found


@dataclass(frozen=True)
class TrialRow:
    """One schedule beside H alone. label: the schedule, with its steps where they are others; saved: share of H's block FLOPs.

    figures: bits, entropy and distinct_4 of a text; differences: paired, to H on the same seeds; seconds, calls: of a text.
    """

    label: str
    texts: int
    saved: float
    path_kl: float
    figures: Mapping[str, Mean]
    differences: Mapping[str, Mean]
    seconds: float
    calls: Mapping[str, float]

    @classmethod
    def of(cls, label: str, outcome: Outcome, reference: Outcome, path_kl: float) -> TrialRow:
        own = {name: outcome.mean(name) for name in outcome.figures}
        paired = {name: outcome.against(reference, name) for name in outcome.figures}
        seconds = outcome.seconds / outcome.texts
        return cls(label, outcome.texts, outcome.saved(reference), path_kl, own, paired, seconds, outcome.calls)

    def record(self) -> dict[str, object]:
        own = {name: mean.record() for name, mean in self.figures.items()}
        paired = {f"d_{name}": mean.record() for name, mean in self.differences.items()}
        facts = {"schedule": self.label, "texts": self.texts, "saved": self.saved, "path_kl": self.path_kl}
        return facts | own | paired | {"seconds": self.seconds, "calls": dict(self.calls)}


@dataclass(frozen=True)
class SearchReport:
    """best: the schedule to take, in `taken` steps; winner: its label among the rows; saved: the share asked for.

    front: labels that no other beats in both FLOPs and bits; rank_agreement: Spearman's, of path KL and bits over the schedules tried.
    nats: a text, lost by theory where fewer steps were weighed too. file: where the best is kept for `--schedule auto`.
    """

    heavy: str
    light: str
    search: str
    saved: float
    segments: int
    steps: int
    sampler: str
    samples: int
    judge: str
    seed: int
    best: str
    winner: str
    taken: int
    nats: float
    kl: Mapping[str, Sequence[float]]
    rows: tuple[TrialRow, ...]
    front: tuple[str, ...]
    rank_agreement: float
    file: Path | None = None

    def settings(self) -> dict[str, str | float]:
        """How the search was made."""
        return {name: getattr(self, name) for name in ("search", "saved", "segments", "steps", "sampler", "samples", "judge", "seed")}

    @property
    def shortfall(self) -> float | None:
        """The share that the winner saved in the forward passes that happened, where that is less than was asked for."""
        saved = next(row.saved for row in self.rows if row.label == self.winner)
        return saved if saved < self.saved - ways.CHANCE else None

    def record(self) -> dict[str, object]:
        """As `dlm schedule search --json` prints it."""
        facts: dict[str, object] = {"format": FORMAT, "heavy": self.heavy, "light": self.light} | self.settings()
        found = {"best": self.best, "winner": self.winner, "taken": self.taken, "kl": {key: list(nats) for key, nats in self.kl.items()}}
        rows = {"rows": [row.record() for row in self.rows], "front": list(self.front), "rank_agreement": self.rank_agreement}
        return facts | found | rows


@told
def search(
    heavy: Model,
    light: Light,
    *,
    way: str = "kl",
    saved: float = 0.35,
    segments: int = 8,
    steps: int = 64,
    sampler: str = "ancestral",
    samples: int = 16,
    count: int = 24,
    judge: Model = "shakespeare-ar",
    data: str | Path | None = None,
    max_windows: int = 32,
    ledger: Path | None = None,
    save: bool = False,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> SearchReport:
    """The best schedule that saves a share of H's block FLOPs; each one tried writes the same seeds, beside H alone and L alone.

    way: kl (by theory), joint (and fewer steps), exhaustive, or halving of `count` schedules. samples: texts for each; data, max_windows:
    text to measure the KL on. ledger: a file of trials, with which a search that stopped goes on. save: keep the best beside H, for
    `--schedule auto`. progress counts rows that are read; its total grows once the plan is made. InputError where nothing saves so much.
    """
    if way not in ways.WAYS:
        raise InputError(f"unknown search {way!r}; known: {', '.join(ways.WAYS)}")
    _check_samples(samples)
    pair = ModelPair.of(heavy, light, device)
    if save and pair.lm.path is None:
        raise InputError(f"{pair.lm.name} is not on disk: there is no place beside it")
    trials = Trials(pair, judge, sampler=sampler, ledger=ledger)
    trials(steps)  # a judge or sampler that cannot be is told before the work
    windows_WT = Text.read(pair.lm, data, max_windows=max_windows).windows_WT
    counter = Counter(progress, len(windows_WT) * segments)
    kl = pair.kl(windows_WT, segments, seed, counter)
    price = pair.price(windows_WT, Counter(silent, 0)) if way == "joint" else None
    plan = ways.Search.plan(way, kl, pair.blocks, saved, steps=steps, tokens=pair.lm.window, count=count, price=price)
    counter.total += plan.trials * samples * steps
    outcomes: dict[str, Outcome] = {}
    for label, outcome in plan.run(trials, texts=samples, seed=seed):
        outcomes[label] = outcome
        counter.add(samples * steps)
    report = _search_report(pair, plan, outcomes, kl, judge_name(trials), saved, segments, sampler, samples, seed)
    if save and pair.lm.path is not None:
        kept = SavedSchedule(ModelSchedule.parse(report.best), pair.light, plan.taken, report.settings())
        return replace(report, file=kept.save(pair.lm.path))
    return report


def judge_name(trials: Trials) -> str:
    return str(trials.settings["judge"])


def _check_samples(samples: int) -> None:
    if samples < 2:
        raise InputError(f"--samples must be at least 2, to have an error, got {samples}")


def _search_report(
    pair: ModelPair,
    plan: ways.Search,
    outcomes: Mapping[str, Outcome],
    kl: Mapping[str, Sequence[float]],
    judge: str,
    saved: float,
    segments: int,
    sampler: str,
    samples: int,
    seed: int,
) -> SearchReport:
    """The results of the outcomes, by label."""
    reference = outcomes[str(plan.alone[0])]
    rows = _rows(outcomes, reference, {label: one.schedule for label, one in outcomes.items()}, kl, pair.lm.window)
    whole = {label: outcome for label, outcome in outcomes.items() if outcome.texts == samples}
    mixed = rows[len(plan.alone) :]
    winner = plan.winner(whole, saved)
    return SearchReport(
        heavy=pair.lm.name,
        light=pair.words,
        search=plan.way,
        saved=saved,
        segments=segments,
        steps=plan.steps,
        sampler=sampler,
        samples=samples,
        judge=judge,
        seed=seed,
        best=outcomes[winner].schedule,
        winner=winner,
        taken=plan.taken,
        nats=plan.nats,
        kl=kl,
        rows=rows,
        front=tuple(pareto_front(whole, lambda label: whole[label].blocks / samples, lambda label: whole[label].mean("bits").value)),
        rank_agreement=spearman([row.path_kl for row in mixed], [row.figures["bits"].value for row in mixed]),
    )


def _rows(
    outcomes: Mapping[str, Outcome], reference: Outcome, schedules: Mapping[str, str], kl: Mapping[str, Sequence[float]], tokens: int
) -> tuple[TrialRow, ...]:
    paths = {label: ways.path_kl(ModelSchedule.parse(schedules[label]), kl, tokens) for label in outcomes}
    return tuple(TrialRow.of(label, outcome, reference, paths[label]) for label, outcome in outcomes.items())


@dataclass(frozen=True)
class Comparison:
    """Schedules beside H alone, on the same seeds. kl: of every segment, by key."""

    heavy: str
    light: str
    steps: int
    sampler: str
    samples: int
    judge: str
    seed: int
    kl: Mapping[str, Sequence[float]]
    rows: tuple[TrialRow, ...]

    def record(self) -> dict[str, object]:
        """As `dlm schedule compare --json` prints it."""
        found = {"kl": {key: list(nats) for key, nats in self.kl.items()}, "rows": [row.record() for row in self.rows]}
        return {"format": FORMAT} | fields_of(self) | found


@told
def compare(
    heavy: Model,
    light: Light,
    schedules: Sequence[str],
    *,
    steps: int = 256,
    sampler: str = "ancestral",
    samples: int = 16,
    judge: Model = "shakespeare-ar",
    data: str | Path | None = None,
    segments: int = 16,
    max_windows: int = 32,
    ledger: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Comparison:
    """Measure these schedules beside H alone; `NAME@STEPS` in another number of steps, as in `H@100`.

    The other arguments are those of `search`. progress counts rows that are read.
    """
    plan = {"H": (HEAVY, steps)} | {label: _parse(label, steps) for label in schedules}
    _check_samples(samples)
    pair = ModelPair.of(heavy, light, device)
    trials = Trials(pair, judge, sampler=sampler, ledger=ledger)
    trials(steps)  # a judge or sampler that cannot be is told before the work
    windows_WT = Text.read(pair.lm, data, max_windows=max_windows).windows_WT
    counter = Counter(progress, len(windows_WT) * segments + sum(taken for _, taken in plan.values()) * samples)
    kl = pair.kl(windows_WT, segments, seed, counter)
    outcomes: dict[str, Outcome] = {}
    for label, (word, taken) in plan.items():
        outcomes[label] = trials(taken)(word, seed, seed + samples)
        counter.add(taken * samples)
    words = {label: word for label, (word, _) in plan.items()}
    rows = _rows(outcomes, outcomes["H"], words, kl, pair.lm.window)
    return Comparison(pair.lm.name, pair.words, steps, sampler, samples, judge_name(trials), seed, kl, rows)


def _parse(label: str, steps: int) -> tuple[str, int]:
    """(schedule, steps) of `H@100`. InputError for a number of steps that is none."""
    word, at, count = label.partition("@")
    if at and not (count.isdecimal() and int(count)):
        raise InputError(f"{label!r}: after @ stands a number of steps, as in H@100")
    return str(ModelSchedule.parse(word)), int(count or steps)
