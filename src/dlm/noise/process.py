"""From a word or the `noise` entry of a config.json to a process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlm.noise import schedule
from dlm.noise.hybrid import HybridNoise
from dlm.noise.masked import MaskedNoise
from dlm.noise.semantic import SemanticNoise
from dlm.noise.uniform import UniformNoise

Process = MaskedNoise | UniformNoise | SemanticNoise | HybridNoise
PROCESSES: dict[str, type[Process]] = {"masked": MaskedNoise, "uniform": UniformNoise, "semantic": SemanticNoise, "hybrid": HybridNoise}
SETTING = {"semantic": "lead", "hybrid": "share"}  # what the number after the colon sets


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
