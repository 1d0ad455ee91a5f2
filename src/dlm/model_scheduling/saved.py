"""A schedule beside the heavy checkpoint, for `--schedule auto`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.errors import InputError
from dlm.files import write_text
from dlm.model_scheduling.plan import ModelSchedule

FILE = "schedule.json"


@dataclass(frozen=True)
class SavedSchedule:
    """schedule: in shares; light: names or paths of the other models by key; steps: of a window; made: how it was found."""

    schedule: ModelSchedule
    light: dict[str, str]
    steps: int
    made: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: Path) -> Path:
        """To a temporary name first."""
        path = directory / FILE
        data = {"schedule": str(self.schedule), "light": self.light, "steps": self.steps, "made": self.made}
        write_text(path, json.dumps(data, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, directory: Path) -> SavedSchedule:
        """InputError where there is none or where it is damaged."""
        path = directory / FILE
        if not path.is_file():
            raise InputError(f"--schedule auto needs a search: run dlm schedule search {directory} LIGHT --save")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            light = {str(key): str(name) for key, name in data["light"].items()}
            return cls(ModelSchedule.parse(data["schedule"]), light, int(data["steps"]), dict(data.get("made", {})))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error!r}): run dlm schedule search again") from None
