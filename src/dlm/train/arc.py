"""ARC in training: each draw is a task under a random view, of which one pair is the test and its output is predicted.

The axes of a window are pair, row, input or output, and column: a position has these four coordinates, each with a learned vector.
Shapes: B rows, P pairs, S rows and columns of a grid, T = P S 2 S cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlm.errors import InputError, unknown
from dlm.grids import arc, arc_rules
from dlm.grids.arc import OUTSIDE, Pair, Task, View
from dlm.text.tokenizer import Tokenizer
from dlm.train.data import Stream

WORD, DEMONSTRATIONS, RULES = "arc", "arc+demonstrations", "arc-rules"
"""By the word of `--data`: tasks that train, those and the demonstrations of the tasks that validate, and tasks by generated rules."""
RULE_SIZE, RULE_PAIRS = 5, 3
RULE_TASKS = {"train": 4096, "val": 256}
RULE_SEEDS = {"train": 1_000_000, "val": 0}
LEAST_PAIRS = 2


@dataclass(frozen=True)
class TaskStream(Stream):
    """Tasks of which a draw takes one pair as the test and others as demonstrations, in any order. Its windows are the tasks as they are,
    one for each test."""

    varies: ClassVar[bool] = True
    colours: ClassVar[tuple[str, ...]] = (*arc.PALETTE, "")
    tasks: tuple[tuple[Pair, ...], ...] = ()
    size: int = arc.SIZE
    shown: int = arc.PAIRS

    @classmethod
    def of(cls, tasks: Sequence[Task], size: int, shown: int, name: str, *, demonstrations: Sequence[Task] = ()) -> TaskStream:
        """shown: pairs of a window. demonstrations: tasks of which no test is read. InputError where no task fits and tells its answer."""
        fitting = [task for task in tasks if task.fits(size)]
        if not fitting:
            raise InputError(f"the {name} has no task whose grids fit {size} x {size}")
        known = [(one, test) for one in fitting for test in one.tests if test[1] is not None]
        if not known:
            raise InputError(f"no task of the {name} tells the output of a test, which is what is learned")
        rows = [arc.canvas(one.demonstrations, *test, size=size, pairs=shown) for one, test in known]
        pools = [one.pairs for one in fitting] + [one.demonstrations for one in demonstrations if one.fits(size)]
        usable = tuple(pool for pool in pools if len(pool) >= LEAST_PAIRS)
        return cls(torch.stack(rows).flatten().numpy(), rows[0].numel(), name, tasks=usable, size=size, shown=shown)

    def draw(self, batch: int, rng: torch.Generator) -> Tensor:
        """int64 (B, T)."""
        chosen_B = torch.randint(len(self.tasks), (batch,), generator=rng).tolist()
        return torch.stack([self._drawn(self.tasks[i], rng) for i in chosen_B])

    def _drawn(self, pool: Sequence[Pair], rng: torch.Generator) -> Tensor:
        order = torch.randperm(len(pool), generator=rng).tolist()[: self.shown]
        view = View.random(rng) if self.augment else View()
        *shown, test = (view.pair(pool[i]) for i in order)
        return arc.canvas(shown, *test, size=self.size, pairs=self.shown).flatten()

    def free(self, x_BT: Tensor, free_BT: Tensor, share: float, rng: torch.Generator) -> Tensor:
        """In this share of the rows the output of the test pair, in the others that of every pair; inputs are given."""
        x_BPSNS = x_BT.view(len(x_BT), self.shown, self.size, 2, self.size)
        asked_BP = (x_BPSNS[:, :, 0, 0, 0] != OUTSIDE) & ~((torch.rand(len(x_BT), 1, generator=rng) < share) & _demonstrates(self.shown))
        asked_BPSNS = asked_BP[:, :, None, None, None] & (torch.arange(2) == 1)[:, None]
        return free_BT & asked_BPSNS.expand_as(x_BPSNS).flatten(1)


def _demonstrates(pairs: int) -> Tensor:
    return torch.arange(pairs) < pairs - 1


@dataclass(frozen=True)
class ArcData:
    """Tasks as data. word: one of `WORD`, `DEMONSTRATIONS`, `RULES`; place: a file or folder of tasks. size: rows and columns of the canvas
    of a grid; shown: pairs of a window; rule: the only one of generated tasks."""

    word: str
    place: str = ""
    size: int = arc.SIZE
    shown: int = arc.PAIRS
    rule: str = ""
    unit: ClassVar[str] = "cell"

    @property
    def settings(self) -> Mapping[str, Any]:
        shape = (self.shown, self.size, 2, self.size)
        groups = tuple(tuple(1 if i == axis else side for i, side in enumerate(shape)) for axis in range(len(shape)))
        return {"window": math.prod(shape), "axes": shape, "groups": groups, "conv": 0, "context": 0}

    def tokenizer(self) -> Tokenizer:
        """A digit for each colour, and a dot outside of a grid."""
        return Tokenizer.characters(arc.SYMBOLS)

    @cached_property
    def _read(self) -> dict[str, list[Task]]:
        if self.word == RULES:
            return {
                part: [arc_rules.task(RULE_SEEDS[part] + i, self.size, self.shown, self.rule) for i in range(count)]
                for part, count in RULE_TASKS.items()
            }
        return arc.read(self.place)

    def tasks(self, part: str, val_fraction: float = 0.1) -> list[Task]:
        """Of a part, `train`, `val` or `all`; where the source has no parts, the last tasks validate."""
        if part not in ("train", "val", "all"):
            raise unknown("split", part, ("train", "val", "all"))
        found = self._read
        if "all" in found:
            cut = round(len(found["all"]) * (1 - val_fraction))
            found = {"train": found["all"][:cut], "val": found["all"][cut:]}
        return [task for name in (("train", "val") if part == "all" else (part,)) for task in found.get(name, [])]

    def stream(self, part: str, window: int, val_fraction: float) -> TaskStream:
        more = self.tasks("val", val_fraction) if self.word == DEMONSTRATIONS and part == "train" else []
        found = TaskStream.of(self.tasks(part, val_fraction), self.size, self.shown, f"{part} part", demonstrations=more)
        return found if self.word != RULES else RuleStream(**vars(found), rule=self.rule)


@dataclass(frozen=True)
class RuleStream(TaskStream):
    """Generated tasks, a new one for each draw. rule: the only one, if there is one alone."""

    rule: str = ""

    def draw(self, batch: int, rng: torch.Generator) -> Tensor:
        seeds_B = torch.randint(2 * RULE_SEEDS["train"], 1 << 62, (batch,), generator=rng).tolist()
        made = (arc_rules.task(seed, self.size, self.shown, self.rule) for seed in seeds_B)
        return torch.stack([arc.canvas(one.demonstrations, *one.tests[0], size=self.size, pairs=self.shown).flatten() for one in made])


def find(source: str) -> ArcData:
    """`arc:PLACE`, `arc+demonstrations:PLACE`, `arc-rules:SIZE` or `arc-rules:SIZE:RULE`. InputError for an unknown size or rule."""
    word, _, place = source.partition(":")
    if word != RULES:
        return ArcData(word, place)
    size, _, rule = place.partition(":")
    if size and size not in map(str, range(arc_rules.LEAST, arc.LARGEST + 1)):
        raise InputError(f"{source} is unknown: grids of rules have {arc_rules.LEAST} to {arc.LARGEST} rows, as in arc-rules:5")
    if rule and rule not in arc_rules.RULES:
        raise unknown("rule", rule, arc_rules.RULES)
    return ArcData(word, size=int(size or RULE_SIZE), shown=RULE_PAIRS, rule=rule)
