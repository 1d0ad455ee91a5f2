"""From a word or the `noise` entry of a config.json to a process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from dlm.noise import schedule
from dlm.noise.hybrid import HybridNoise
from dlm.noise.masked import MaskedNoise
from dlm.noise.semantic import SemanticNoise
from dlm.noise.uniform import UniformNoise
from dlm.protocols import NoiseProcess

Process = MaskedNoise | UniformNoise | SemanticNoise | HybridNoise
PROCESSES: dict[str, type[Process]] = {"masked": MaskedNoise, "uniform": UniformNoise, "semantic": SemanticNoise, "hybrid": HybridNoise}
SETTING = {"semantic": "lead", "hybrid": "share"}  # what the number after the colon sets


def register(name: str, process: type[Any], setting: str = "") -> None:
    """Make a noise process of your own known by a name, to settings, the command line and config.json.

    process: a dataclass made with (vocab_size, mask_id, schedule, ...). setting: the field that a number after a colon sets.
    """
    PROCESSES[name] = process
    if setting:
        SETTING[name] = setting


def name_of(process: type[Any]) -> str:
    """The name of a class. ValueError where it is not registered."""
    for name, known in PROCESSES.items():
        if process is known:
            return name
    raise ValueError(f"{process.__name__} has no name: dlm.noise.process.register gives a noise process one")


def settings(noise: NoiseProcess) -> dict[str, Any]:
    """The entry of config.json that `make` turns into this process. ValueError for a class or a schedule that is not registered."""
    known = {"process": name_of(type(noise)), "schedule": schedule.word(noise.schedule)}
    if not is_dataclass(noise):
        raise ValueError(f"{type(noise).__name__} is no dataclass: its settings cannot be written down")
    own = [f for f in fields(noise) if f.name not in ("vocab_size", "mask_id", "schedule")]
    values = {f.name: getattr(noise, f.name) for f in own if f.name == "head" or getattr(noise, f.name) != f.default}
    return known | {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def parse(word: str) -> dict[str, Any]:
    """`"uniform"`, or with its setting `"hybrid:0.3"`, `"semantic:2"` -> entries of the settings. ValueError says what is known."""
    name, colon, value = word.partition(":")
    if name not in PROCESSES:
        raise ValueError(f"unknown noise {name!r}; known: {', '.join(PROCESSES)}")
    if colon and name not in SETTING:
        raise ValueError(f"{name} noise has no setting, got {word!r}")
    try:
        return {"process": name} | ({SETTING[name]: float(value)} if colon else {})
    except ValueError:
        raise ValueError(f"noise {word!r}: {value!r} is no number") from None


def make(settings: Mapping[str, Any], vocab_size: int, mask_id: int) -> Process:
    """The process that config.json describes: process, schedule and what that process needs. ValueError says what is wrong."""
    rest = dict(settings)
    name, alpha = rest.pop("process", ""), schedule.parse(rest.pop("schedule", "linear"))
    if name not in PROCESSES:
        raise ValueError(f"unknown noise {name!r}; known: {', '.join(PROCESSES)}")
    if "clusters" in rest:
        rest["clusters"] = tuple(int(c) for c in rest["clusters"])
    try:
        return PROCESSES[name](vocab_size, mask_id, alpha, **rest)
    except TypeError as error:
        raise ValueError(f"{name} noise: {error}") from None
