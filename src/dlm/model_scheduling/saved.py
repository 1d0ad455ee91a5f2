"""A schedule beside the heavy checkpoint, for `--schedule auto`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from dlm.errors import InputError, in_range
from dlm.files import check_stamp, check_types, read_json, stamp, write_text
from dlm.model_scheduling.plan import ModelSchedule
from dlm.sampling.diffusion.loop import MAX_STEPS

FILE = "schedule.json"
FORMAT = 1


@dataclass(frozen=True)
class SavedSchedule:
    """schedule: in shares; light: names or paths of the other models by key; steps: of a window; made: how it was found."""

    schedule: ModelSchedule
    light: dict[str, str]
    steps: int
    made: dict[str, str | float] = field(default_factory=dict)

    def save(self, directory: Path) -> Path:
        """To a temporary name first."""
        path = directory / FILE
        data = stamp(FORMAT) | {"schedule": str(self.schedule), "light": self.light, "steps": self.steps, "made": self.made}
        write_text(path, json.dumps(data, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, directory: Path) -> SavedSchedule:
        """InputError where there is none, or one that is damaged or of a later format."""
        path = directory / FILE
        if not path.is_file():
            raise InputError(f"--schedule auto needs a search: run dlm schedule search {directory} LIGHT --save")
        data = read_json(path)
        try:
            check_stamp(data, FORMAT, path)
            check_types(cls, {"steps": data["steps"], "light": data["light"]}, path)
            in_range(data["steps"], 1, MAX_STEPS, f"{path}: steps")
            light = {str(key): str(name) for key, name in data["light"].items()}
            return cls(ModelSchedule.parse(data["schedule"]), light, data["steps"], dict(data.get("made", {})))
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error!r}): run dlm schedule search again") from None
