"""`--sampler auto`: the setting that a measurement of this model found best within a budget.

`dlm calibrate` measures every candidate and keeps the table beside the checkpoint; here it is read and one row chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dlm.errors import InputError
from dlm.evaluation.statistics import pareto_front
from dlm.files import check_stamp, check_types, read_json, stamp, write_text

FILE, FORMAT = "calibration.json", 1
ENTROPY, DISTINCT = 0.15, 0.9  # bits below the exact sampler, and share of its: less is dull

Options = dict[str, Any]
"""Keyword arguments of `LanguageModel.sampler`."""


@dataclass(frozen=True)
class Row:
    """One measured setting. calls: forward passes of a batch; seconds of each text; bits per token under the judge; diversity.

    exact: whether the distribution is that of one token a forward pass; options are those of `LanguageModel.sampler`.
    """

    options: Options
    calls: float
    seconds: float
    bits: float
    bits_stderr: float
    entropy: float
    distinct_4: float
    exact: bool = False

    @classmethod
    def of(cls, data: dict[str, Any], where: Path) -> Row:
        """From its JSON, whose other keys are left aside. InputError for values of other types, TypeError for missing ones."""
        check_types(cls, data, where)
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})


@dataclass(frozen=True)
class Calibration:
    """The table, and how it was made (judge, texts, length, device)."""

    rows: list[Row]
    made: dict[str, str | float] = field(default_factory=dict)

    def reference(self) -> Row:
        """The exact sampler that the others are held to."""
        return next(row for row in self.rows if row.exact)

    def fair(self) -> list[Row]:
        """The rows whose text is about as varied as the exact sampler's."""
        reference = self.reference()
        least = reference.entropy - ENTROPY, DISTINCT * reference.distinct_4
        return [row for row in self.rows if row.entropy >= least[0] and row.distinct_4 >= least[1]]

    def choose(self, budget: str = "bits:0.1", usable: Callable[[Options], bool] = lambda _: True) -> Row:
        """The best row within `calls:N` or `seconds:X` (the fewest bits), or within `bits:X` of the exact sampler (the least time).

        Only among rows as varied as the exact sampler whose options are usable. InputError for a budget that is none or that no row keeps.
        """
        kind, _, value = budget.partition(":")
        try:
            amount = float(value)
        except ValueError:
            amount = -1.0
        if kind not in ("calls", "seconds", "bits") or not 0 <= amount < float("inf"):
            raise InputError(f"a budget is calls:32, seconds:2 or bits:0.1, got {budget!r}")
        rows = [row for row in self.fair() if usable(row.options)]
        if kind == "bits":
            within = [row for row in rows if row.bits <= self.reference().bits + amount]
            return min(within, key=lambda row: row.seconds)
        within = [row for row in rows if getattr(row, kind) <= amount]
        if not within:
            least = min(getattr(row, kind) for row in rows)
            raise InputError(f"no setting keeps within {budget}: the least that was measured is {kind}:{least:.3g}")
        return min(within, key=lambda row: row.bits)

    def front(self, cost: str = "calls") -> list[Row]:
        """The fair rows that no other beats in both cost and bits, cheapest first."""
        return pareto_front(self.fair(), lambda row: float(getattr(row, cost)), lambda row: row.bits)

    def save(self, directory: Path) -> Path:
        """Write it beside the checkpoint, to a temporary name first."""
        path = directory / FILE
        write_text(path, json.dumps(stamp(FORMAT) | self.record(), indent=1) + "\n")
        return path

    def record(self) -> dict[str, object]:
        """As it is written, and as `dlm calibrate --json` prints it."""
        return {"format": FORMAT, "made": self.made, "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def load(cls, directory: Path) -> Calibration:
        """InputError where there is none, or one that is damaged or of a later format."""
        path = directory / FILE
        if not path.is_file():
            raise InputError(f"--sampler auto needs a measurement of this model: run dlm calibrate {directory}")
        data = read_json(path)
        try:
            check_stamp(data, FORMAT, path)
            found = cls([Row.of(row, path) for row in data["rows"]], dict(data["made"]))
            found.reference()
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
            raise InputError(f"{path} is damaged ({error!r}): run dlm calibrate {directory}") from None
        return found
