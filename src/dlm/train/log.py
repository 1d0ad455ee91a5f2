"""The curve on disk: log.jsonl, one object a line, and TensorBoard if asked."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dlm.errors import InputError
from dlm.files import write_text


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
    return path.is_file() and any(json.loads(line).get("step") == steps for line in path.read_text(encoding="utf-8").splitlines())


def _until(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            kept += [line] if json.loads(line)["step"] <= step else []
    return kept
