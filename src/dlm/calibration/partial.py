"""The rows of a calibration under way on disk, one JSON line each, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from dlm.calibration.table import FORMAT, Options, Row
from dlm.errors import InputError
from dlm.files import check_types, parse_json, stamp

FILE = "calibration.partial.jsonl"


class Partial:
    """Measured rows by their options. The first line of the file has the settings of the measurement; a row is appended at once.

    A file of other settings, or a line that was cut short by a kill, counts for nothing.
    """

    def __init__(self, directory: Path, settings: Mapping[str, object]) -> None:
        """settings: of the measurement, fingerprints of all weights among them."""
        self.path, self.head = directory / FILE, json.dumps(stamp(FORMAT) | dict(settings))
        self._known: dict[str, Row] = {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        if not lines or lines[0] != self.head:
            return
        for line in lines[1:]:
            try:
                data = parse_json(line, self.path)
                check_types(Row, data, self.path)
                row = Row(**data)
            except (InputError, TypeError, AttributeError):
                continue
            self._known[json.dumps(row.options, sort_keys=True)] = row

    def row(self, options: Options, measure: Callable[[Options], Row]) -> Row:
        """The row of this setting, measured unless it is there."""
        if (key := json.dumps(options, sort_keys=True)) not in self._known:
            if not self._known:  # a new file, or one of other settings
                self.path.write_text(self.head, encoding="utf-8")
            self._known[key] = measure(options)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(asdict(self._known[key])))  # ends a line that was cut short
        return self._known[key]

    @staticmethod
    def delete(directory: Path) -> None:
        """For a calibration that is complete."""
        (directory / FILE).unlink(missing_ok=True)
