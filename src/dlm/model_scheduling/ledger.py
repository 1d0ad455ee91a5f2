"""The trials of a search on disk, one JSON line each, so that a search that was killed goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from dlm.errors import InputError
from dlm.files import append_json, check_stamp, check_types, json_lines, stamp
from dlm.model_scheduling.outcome import Outcome

FORMAT = 1
FIGURES = {one.name for one in fields(Outcome)} - {"seeds"}
Key = tuple[str, str, tuple[int, int]]


class Ledger:
    """Outcomes by settings, schedule and seeds. The file is read once; an outcome that is added is appended at once.

    A line that was cut short by a kill is passed over. InputError for a line of a later format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[Key, Outcome] = {}
        for number, data in json_lines(path):
            where = f"{path}, line {number},"
            if not isinstance(data, dict):
                raise InputError(f"{where} is damaged (it holds a {type(data).__name__}): delete it")
            check_stamp(data, FORMAT, path)
            check_types(Outcome, data, where)
            if lacking := [name for name in ("schedule", "seeds", "figures", "blocks", "head", "seconds", "calls") if name not in data]:
                raise InputError(f"{where} is damaged (it lacks {lacking[0]}): delete it")
            settings, seeds = data.pop("settings", None), data.pop("seeds")
            outcome = Outcome(seeds=(seeds[0], seeds[1]), **{name: value for name, value in data.items() if name in FIGURES})
            self._known.setdefault(self._key(settings, outcome.schedule, outcome.seeds), outcome)

    @staticmethod
    def _key(settings: Mapping[str, object] | None, schedule: str, seeds: tuple[int, int]) -> Key:
        return json.dumps(settings, sort_keys=True), schedule, seeds

    def find(self, settings: Mapping[str, object], schedule: str, seeds: tuple[int, int]) -> Outcome | None:
        """The measurement of this schedule on exactly these seeds under these settings."""
        return self._known.get(self._key(settings, schedule, seeds))

    def add(self, settings: Mapping[str, object], outcome: Outcome) -> None:
        self._known[self._key(settings, outcome.schedule, outcome.seeds)] = outcome
        append_json(self.path, stamp(FORMAT) | {"settings": dict(settings)} | asdict(outcome))
