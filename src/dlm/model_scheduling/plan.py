"""A model schedule: which model takes which denoising step, as in `L125 H750 L125`. Shapes: B rows."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.sampling.diffusion.loop import MAX_STEPS

HEAVY, LIGHT = "H", "L"
GRAIN = 100  # segments of `alternate` and `random`
SEGMENT = re.compile(r"([A-Z])(\d+\.\d*|\.\d+|\d+)")
SLACK = 1e-9  # of a share, so that 0.1 + 0.2 ends where 0.3 does


@dataclass(frozen=True)
class ModelSchedule:
    """Segments (key of the model, length) from noise to text. Lengths are all whole numbers of steps, or all shares of the run.

    Two neighbours of one model are one segment. InputError for a length that is not positive, or shares that do not sum to 1.
    """

    segments: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        lengths = [length for _, length in self.segments]
        if not lengths or min(lengths) <= 0:
            raise InputError("a schedule needs segments of a length above 0, as in L125 H750 L125")
        if len({isinstance(length, int) for length in lengths}) > 1:
            raise InputError(f"{self}: give all lengths in steps (L125) or all as shares of the run (L0.125)")
        if self.steps is None and abs(sum(lengths) - 1) > 1e-6:
            raise InputError(f"{self}: the shares sum to {sum(lengths):.4g}, not to 1")
        if (self.steps or 0) > MAX_STEPS:
            raise InputError(f"a schedule has at most {MAX_STEPS} steps, got {self.steps}")
        groups = groupby(self.segments, key=lambda segment: segment[0])
        object.__setattr__(self, "segments", tuple((key, sum(length for _, length in group)) for key, group in groups))

    def __str__(self) -> str:
        return " ".join(
            f"{key}{length if isinstance(length, int) else format(length, '.4f').rstrip('0') + '0'[: length == 1]}"
            for key, length in self.segments
        )

    @property
    def steps(self) -> int | None:
        """The steps it counts; None for shares."""
        lengths = [length for _, length in self.segments]
        return sum(lengths) if all(isinstance(length, int) for length in lengths) else None  # type: ignore[return-value]

    @property
    def models(self) -> tuple[str, ...]:
        """The keys that occur, sorted."""
        return tuple(sorted({key for key, _ in self.segments}))

    def share(self, key: str) -> float:
        """Of the steps that a model takes."""
        return sum(length for k, length in self.segments if k == key) / sum(length for _, length in self.segments)

    def keys(self, done_B: Tensor) -> list[str]:
        """The model of each row after this share of the steps."""
        ends = torch.tensor([*accumulate(length for _, length in self.segments)], dtype=torch.float64)
        index_B = torch.searchsorted(ends, (done_B.double().cpu() + SLACK) * ends[-1], right=True).clamp(max=len(ends) - 1)
        return [self.segments[i][0] for i in index_B.tolist()]

    def each(self, steps: int) -> list[str]:
        """The key of every step of a run. InputError where it counts another number of steps."""
        self.check(steps)
        return self.keys(torch.arange(steps, dtype=torch.float64) / steps)

    def check(self, steps: int, known: Sequence[str] | None = None) -> None:
        """InputError where its lengths do not sum to the steps of the run, or where it names a model that is not there."""
        if self.steps is not None and self.steps != steps:
            raise InputError(
                f"the schedule {self} has {self.steps} steps and the run {steps}: --steps {self.steps}, or shares as in L0.5 H0.5"
            )
        strangers = [key for key in self.models if known is not None and key not in known]
        if strangers and known is not None:
            raise InputError(f"the schedule {self} names {', '.join(strangers)}; the models are {', '.join(known)}")

    @classmethod
    def of(cls, keys: Sequence[str], *, shares: bool = False) -> ModelSchedule:
        """From one key a step, or a segment of equal share."""
        return cls(tuple((key, 1 / len(keys) if shares else 1) for key in keys))

    @classmethod
    def parse(cls, text: str) -> ModelSchedule:
        """`L125 H750 L125`, `L0.125 H0.75 L0.125`, `H` for one model, or a shape with its light share: `sandwich:0.25`."""
        name, _, setting = text.strip().partition(":")
        if name in SHAPES:
            return _shape(name, setting)
        words = text.replace(",", " ").split()
        if len(words) == 1 and re.fullmatch("[A-Z]", words[0]):
            return cls(((words[0], 1.0),))
        found = [SEGMENT.fullmatch(word) for word in words]
        if not words or None in found:
            raise InputError(
                f"no schedule {text!r}: write L125 H750 L125, L0.125 H0.75 L0.125, or one of {', '.join(SHAPES)} as in sandwich:0.25"
            )
        pairs = [(match[1], match[2]) for match in found if match is not None]
        return cls(tuple((key, float(length) if "." in length else int(length)) for key, length in pairs))


def _spread(share: float, _seed: int) -> list[str]:
    count = round(share * GRAIN)
    return [LIGHT if (i + 1) * count // GRAIN > i * count // GRAIN else HEAVY for i in range(GRAIN)]


def _random(share: float, seed: int) -> list[str]:
    keys = [LIGHT] * round(share * GRAIN)
    keys += [HEAVY] * (GRAIN - len(keys))
    random.Random(seed).shuffle(keys)
    return keys


Segments = list[tuple[str, float]]
SHAPES: dict[str, Callable[[float, int], Segments]] = {
    "sandwich": lambda f, _: [(LIGHT, f / 2), (HEAVY, 1 - f), (LIGHT, f / 2)],
    "prefix": lambda f, _: [(LIGHT, f), (HEAVY, 1 - f)],
    "suffix": lambda f, _: [(HEAVY, 1 - f), (LIGHT, f)],
    "middle": lambda f, _: [(HEAVY, (1 - f) / 2), (LIGHT, f), (HEAVY, (1 - f) / 2)],
    "alternate": lambda f, seed: [(key, 1 / GRAIN) for key in _spread(f, seed)],
    "random": lambda f, seed: [(key, 1 / GRAIN) for key in _random(f, seed)],
}


def _shape(name: str, setting: str) -> ModelSchedule:
    share, _, seed = setting.partition(",")
    try:
        light, number = float(share), int(seed or 0)
    except ValueError:
        light, number = -1.0, 0
    if not 0 <= light <= 1 or (seed and name != "random"):
        raise InputError(f"{name} takes the share of light steps, as in {name}:0.25{' or random:0.25,SEED' if name == 'random' else ''}")
    return ModelSchedule(tuple((key, length) for key, length in SHAPES[name](light, number) if length > 0))
