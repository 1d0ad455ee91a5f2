"""The curve on disk: log.jsonl, one object a line, and TensorBoard if asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dlm.errors import InputError
from dlm.files import parse_json, write_text


class Log:
    """Opened at `step`, it drops the lines that a killed run wrote after its last save, half a line included. Only `main` writes."""

    def __init__(self, out: Path, step: int, *, tensorboard: bool, main: bool) -> None:
        self.file: TextIO | None = None
        self.board: Any = None
        if not main:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError:
                raise InputError("TensorBoard logs need the viz extra: pip install 'dlm[viz]'") from None
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        path = out / "log.jsonl"
        kept = _until(path, step) if step and path.is_file() else []
        write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: float) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step} | values) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()


def finished(out: Path, steps: int) -> bool:
    """Whether the run in `out` has come to that step."""
    path = out / "log.jsonl"
    return path.is_file() and steps in [at for at, _ in _lines(path)]


def _until(path: Path, step: int) -> list[str]:
    return [line for at, line in _lines(path) if at <= step]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that say at which step they were written, each with it; others were cut short by a kill."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(InputError):
            found = parse_json(line, path)
            if isinstance(found, dict) and isinstance(found.get("step"), int):
                yield found["step"], line
