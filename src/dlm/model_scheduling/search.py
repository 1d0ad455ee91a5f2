"""The best schedule for its FLOPs: by theory, by trying all, or by trying many and dropping the worse half again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from dlm.errors import InputError
from dlm.model_scheduling.cost import expected_calls
from dlm.model_scheduling.outcome import Outcome
from dlm.model_scheduling.plan import HEAVY, LIGHT, SHAPES, ModelSchedule

Run = Callable[[str, int, int], Outcome]
"""(schedule, first seed, one past the last) -> its outcome."""
Price = Callable[[int], float]
"""Number of steps -> nats a text that it loses by drawing tokens at once."""
ROUNDS = 3  # of halving
ENUMERATED_SCHEDULES = 5000  # at most, by --search exhaustive
CHANCE = 0.01  # of the FLOPs: how far the forward passes that happened may fall short of the plan
WAYS = ("kl", "joint", "exhaustive", "halving")


@dataclass(frozen=True)
class Search:
    """The trials of one way to search: each model alone in all `steps`, then the `tried` in `taken` of them.

    best: by theory, which loses `nats` a text where fewer steps were weighed too.
    """

    way: str
    alone: list[ModelSchedule]
    tried: list[ModelSchedule]
    best: ModelSchedule
    steps: int
    taken: int
    nats: float = math.nan

    @classmethod
    def plan(
        cls,
        way: str,
        kl: Mapping[str, Sequence[float]],
        blocks: Mapping[str, float],
        saved: float,
        *,
        steps: int,
        tokens: int,
        count: int,
        price: Price | None = None,
    ) -> Search:
        """kl, blocks, saved: as of `by_kl`. tokens: of a text; count: schedules that halving begins with; price: of `joint`, nats a text
        that a number of steps loses by drawing tokens at once. InputError where nothing saves so much, or there is too much to try."""
        segments, taken, nats = len(kl[HEAVY]), steps, math.nan
        if way == "joint":
            assert price is not None
            counts = step_counts(steps, 16)
            prices, calls = {n: price(n) for n in counts}, {n: sum(expected_calls(n, tokens)) for n in counts}
            taken, best, nats = jointly(kl, blocks, prices, calls, tokens, saved)
        else:
            best = by_kl(kl, blocks, saved)
        tried = [best]
        if way == "exhaustive":
            if set(blocks) != {HEAVY, LIGHT}:
                raise InputError("--search exhaustive is for one light model; a ladder takes --search kl or halving")
            tried = exhaustive(segments, next(n for n in range(segments + 1) if n / segments * _worth(blocks) >= saved - 1e-9))
        elif way == "halving":
            tried = candidates(best, segments, count)
        return cls(way, [ModelSchedule.parse(key) for key in blocks], tried, best, steps, taken, nats)

    @property
    def trials(self) -> int:
        """How many outcomes `run` yields."""
        rounds = sum(-(-len(self.tried) // 2**k) for k in range(ROUNDS)) + 1
        return len(self.alone) + (rounds if self.way == "halving" else len(self.tried))

    def run(self, trial: Callable[[int], Run], *, texts: int, seed: int) -> Iterator[tuple[str, Outcome]]:
        """(label, outcome) as they come, H alone first; a label that comes again replaces its outcome. trial: by number of steps."""
        for schedule in self.alone:
            yield str(schedule), trial(self.steps)(str(schedule), seed, seed + texts)
        if self.way == "halving":
            for outcome in halving(trial(self.steps), self.tried, texts=texts, seed=seed):
                yield outcome.schedule, outcome
            return
        for schedule in self.tried:
            yield self.label(schedule), trial(self.taken)(str(schedule), seed, seed + texts)

    def label(self, schedule: ModelSchedule) -> str:
        """Under which `run` yields one of those tried: it tells the steps where they are fewer than H's."""
        return str(schedule) if self.taken == self.steps else f"{schedule}, {self.taken} steps"

    def winner(self, outcomes: Mapping[str, Outcome], saved: float) -> str:
        """The label of the best: by theory, or the one of fewest bits of those tried that save enough against H alone.

        outcomes: by label, H alone among them, all on as many texts. Where by chance none of them saves that much in the forward passes
        that happened, all tried count: each was planned to save it.
        """
        if self.way in ("kl", "joint"):
            return self.label(self.best)
        heavy = outcomes[str(self.alone[0])]
        tried = {label: outcomes[label] for label in map(self.label, self.tried) if label in outcomes}
        enough = [label for label, one in tried.items() if one.saved(heavy) >= saved - CHANCE]
        return min(enough or tried, key=lambda label: tried[label].mean("bits").value)


def by_kl(kl: Mapping[str, Sequence[float]], blocks: Mapping[str, float], saved: float) -> ModelSchedule:
    """The schedule of least path KL that saves this share of the heavy model's block FLOPs, a model a segment.

    kl: nats per token by key and segment; blocks: FLOPs of a forward pass by key. One multiplier prices the FLOPs of all segments;
    for two models that takes the segments of least KL. InputError where no model is cheap enough.
    """
    segments = len(kl[HEAVY])
    budget = (1 - saved) * blocks[HEAVY] * segments * (1 + 1e-9)
    if min(blocks.values()) * segments > budget:
        most = 1 - min(blocks.values()) / blocks[HEAVY]
        raise InputError(f"the cheapest model saves {most:.1%} when it takes every step: {saved:.1%} cannot be")

    def choose(multiplier: float) -> list[str]:
        return [min(kl, key=lambda key, j=j: kl[key][j] + multiplier * blocks[key]) for j in range(segments)]  # type: ignore[misc]

    def spent(keys: Sequence[str]) -> float:
        return sum(blocks[key] for key in keys)

    pairs = [(a, b) for a in kl for b in kl if blocks[a] < blocks[b]]
    turns = {max(0.0, (kl[a][j] - kl[b][j]) / (blocks[b] - blocks[a])) for a, b in pairs for j in range(segments)}
    ordered = [0.0, *sorted(turn * (1 + 1e-9) + 1e-300 for turn in turns)]
    low, high = 0, len(ordered) - 1
    while low < high:  # the least multiplier that keeps within the budget
        middle = (low + high) // 2
        low, high = (low, middle) if spent(choose(ordered[middle])) <= budget else (middle + 1, high)
    keys = choose(ordered[low])
    for j in sorted(range(segments), key=lambda j: kl[keys[j]][j], reverse=True):  # spend the rest of the budget
        for key in sorted(kl, key=lambda key: kl[key][j]):
            if kl[key][j] < kl[keys[j]][j] and spent(keys) - blocks[keys[j]] + blocks[key] <= budget:
                keys[j] = key
                break
    return ModelSchedule.of(keys, shares=True)


def _worth(blocks: Mapping[str, float]) -> float:
    """The share of the FLOPs that L saves in a step that it takes."""
    return 1 - blocks[LIGHT] / blocks[HEAVY]


def jointly(
    kl: Mapping[str, Sequence[float]],
    blocks: Mapping[str, float],
    prices: Mapping[int, float],
    calls: Mapping[int, float],
    tokens: int,
    saved: float,
) -> tuple[int, ModelSchedule, float]:
    """(steps, schedule, nats a text) of least loss: fewer steps cost the loss of parallel draws, lighter ones their path KL, both in nats.

    prices: nats a text that each number of steps loses by drawing tokens at once; calls: that it takes; saved: of the block FLOPs of the
    heavy model in the most steps. InputError where nothing is cheap enough.
    """
    budget, found = (1 - saved) * calls[max(prices)] * (1 + 1e-9), []
    for steps in prices:
        rest = 1 - budget / calls[steps]  # the share that the models have to save at so many steps
        if rest <= 1 - min(blocks.values()) / blocks[HEAVY]:
            schedule = by_kl(kl, blocks, max(0.0, rest))
            found.append((prices[steps] + path_kl(schedule, kl, tokens), steps, schedule))
    if not found:
        raise InputError(f"nothing here saves {saved:.1%}: fewer steps, or a smaller light model")
    nats, steps, schedule = min(found, key=lambda one: one[0])
    return steps, schedule, nats


def path_kl(schedule: ModelSchedule, kl: Mapping[str, Sequence[float]], tokens: int) -> float:
    """Nats a text: the bound on KL(heavy || mixed) of ancestral sampling under the linear schedule."""
    segments = len(kl[HEAVY])
    fine = 100 * segments  # its own segments need not be those of the measurement
    return tokens / fine * sum(kl[key][i // 100] for i, key in enumerate(schedule.each(fine)))


def step_counts(steps: int, count: int) -> list[int]:
    """Numbers of steps to weigh against each other: `steps`, and each a fifth less than the one before."""
    return sorted({max(1, round(steps * 0.8**i)) for i in range(count)})


def exhaustive(segments: int, light: int) -> list[ModelSchedule]:
    """Every way to give `light` of the segments to the light model."""
    if not 0 <= light <= segments or segments < 1:
        raise InputError(f"{light} light segments of {segments}: give 0 .. {segments}")
    ways = list(combinations(range(segments), light))
    if len(ways) > ENUMERATED_SCHEDULES:
        raise InputError(f"{light} of {segments} segments are {len(ways)} schedules: take fewer segments, or --search halving")
    return [ModelSchedule.of([LIGHT if j in way else HEAVY for j in range(segments)], shares=True) for way in ways]


def neighbours(schedule: ModelSchedule, segments: int) -> Iterator[ModelSchedule]:
    """The schedules that differ in two segments which have swapped their models."""
    keys = schedule.each(segments)
    for i, j in combinations(range(segments), 2):
        if keys[i] != keys[j]:
            swapped = list(keys)
            swapped[i], swapped[j] = keys[j], keys[i]
            yield ModelSchedule.of(swapped, shares=True)


def candidates(best: ModelSchedule, segments: int, count: int) -> list[ModelSchedule]:
    """`best`, the named shapes with its light share, and its neighbours spread evenly over all, `count` in all at most."""
    share = 1 - best.share(HEAVY)
    shapes = [ModelSchedule.parse(f"{name}:{share}") for name in SHAPES] if set(best.models) == {HEAVY, LIGHT} else []
    near = list(neighbours(best, segments))
    room = max(0, count - 1 - len(shapes))
    near = near[:: max(1, -(-len(near) // room))] if room else []
    return list({str(schedule): schedule for schedule in [best, *shapes, *near]}.values())[:count]


def halving(run: Run, schedules: Sequence[ModelSchedule], *, texts: int, rounds: int = ROUNDS, seed: int = 0) -> Iterator[Outcome]:
    """Measure all on a few texts, the better half on twice as many, and so on (successive halving, Jamieson and Talwalkar 1502.07943).

    texts: of the last round. Yields every outcome as it comes; the last is the best of those measured on all texts.
    """
    if texts < 2**rounds:
        raise InputError(f"{rounds} rounds of halving need at least {2**rounds} texts, got {texts}")
    alive: dict[str, Outcome | None] = {str(schedule): None for schedule in schedules}
    for left in range(rounds - 1, -1, -1):
        count = texts // 2**left
        for word, sofar in list(alive.items()):
            first = seed if sofar is None else sofar.seeds[1]
            more = run(word, first, seed + count)
            alive[word] = outcome = more if sofar is None else sofar + more
            yield outcome
        ranked = sorted(((o, w) for w, o in alive.items() if o is not None), key=lambda pair: pair[0].mean("bits").value)
        alive = {word: outcome for outcome, word in ranked[: max(1, -(-len(ranked) // 2))]} if left else {ranked[0][1]: ranked[0][0]}
    yield next(outcome for outcome in alive.values() if outcome is not None)
