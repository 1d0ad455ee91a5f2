"""The rows of a calibration under way on disk, one JSON line each, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from dlm.calibration.table import FORMAT, Options, Row
from dlm.errors import InputError
from dlm.files import append_json, json_lines, stamp, write_text

FILE = "calibration.partial.jsonl"


class Partial:
    """Measured rows by their options. The first line of the file has the settings of the measurement; a row is appended at once.

    A file of other settings, or a line that was cut short by a kill, counts for nothing.
    """

    def __init__(self, directory: Path, settings: Mapping[str, object]) -> None:
        """settings: of the measurement, fingerprints of all weights among them."""
        self.path, self.head = directory / FILE, stamp(FORMAT) | dict(settings)
        self._known: dict[str, Row] = {}
        head, *rows = [value for _, value in json_lines(self.path)] or [None]
        for data in rows if head == self.head else []:
            with suppress(InputError, TypeError, AttributeError):
                row = Row.of(data, self.path)
                self._known[_key(row.options)] = row

    def row(self, options: Options, measure: Callable[[Options], Row]) -> Row:
        """The row of this setting, measured unless it is there."""
        key = _key(options)
        if key not in self._known:
            row = measure(options)
            if not self._known:  # a new file, or one of other settings
                write_text(self.path, json.dumps(self.head) + "\n")
            append_json(self.path, asdict(row))
            self._known[key] = row
        return self._known[key]

    @staticmethod
    def delete(directory: Path) -> None:
        """For a calibration that is complete."""
        (directory / FILE).unlink(missing_ok=True)


def _key(options: Options) -> str:
    return json.dumps(options, sort_keys=True)
