"""Measured runs of a benchmark in a file, one JSON object a line, so that an interrupted call goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlm.files import append_json, json_lines


class Rows:
    """The runs measured so far, by the settings that they have."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {row["key"]: row for _, row in json_lines(path)}

    def row(
        self,
        kind: str,
        settings: list[str],
        seed: int,
        *more: int,
        measure: Callable[[], dict[str, Any]],
        told: Callable[[dict[str, Any]], str],
    ) -> dict[str, Any]:
        """The run of this kind, or the one that `measure` makes now. more: settings of the measurement. told: in words, for a new one."""
        key = json.dumps([kind, settings, seed, *more])
        if key not in self.found:
            row = {"key": key, "kind": kind, "seed": seed} | measure()
            self.found[key] = json.loads(json.dumps(row))  # as it is read again
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_json(self.path, row)
            print(f"{kind}, seed {seed}: {told(self.found[key])}", flush=True)
        return self.found[key]
