"""From a word or the `noise` entry of a config.json to a noise process; and processes of your own by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from dlm import plugins
from dlm.errors import InputError, nearest
from dlm.noise import schedule
from dlm.noise.classes import ClassNoise
from dlm.noise.gaussian import GaussianNoise
from dlm.noise.genmd4 import GenMD4Noise
from dlm.noise.gidd import GiddNoise
from dlm.noise.hybrid import HybridNoise
from dlm.noise.masked import MaskedNoise
from dlm.noise.ordered import OrderedNoise
from dlm.noise.score import ScoreNoise
from dlm.noise.semantic import SemanticNoise
from dlm.noise.uniform import UniformNoise
from dlm.protocols import NoiseProcess

Process = MaskedNoise | UniformNoise | SemanticNoise | HybridNoise | GiddNoise | GenMD4Noise | ClassNoise
PROCESSES: dict[str, type[Any]] = {
    "masked": MaskedNoise,
    "uniform": UniformNoise,
    "semantic": SemanticNoise,
    "hybrid": HybridNoise,
    "gidd": GiddNoise,
    "score": ScoreNoise,
    "ordered": OrderedNoise,
    "genmd4": GenMD4Noise,
    "gaussian": GaussianNoise,
    "classes": ClassNoise,
}
SETTING = {"semantic": "lead", "hybrid": "share", "gidd": "p_uniform", "classes": "lead"}  # the field that the number after the colon sets


def register_noise(name: str, factory: type[Any], setting: str = "") -> None:
    """Make a noise process of your own known by its name: to the settings of a training, the command line and config.json.

    factory: a dataclass made with (vocab_size, mask_id, schedule, ...). setting: its field that a number after the colon sets, as in
    `NAME:0.3`. A package does the same by an entry point of the group `dlm.noise` that names the class, whose attribute `setting` is
    read. InputError for a name that is taken.
    """
    if name in known():
        raise InputError(f"the noise {name!r} is there already: register yours under another name")
    if not name or ":" in name:
        raise InputError(f"the name of a noise process has no colon, got {name!r}")
    PROCESSES[name] = factory
    if setting:
        SETTING[name] = setting


def known() -> tuple[str, ...]:
    """The names of all processes: built in, registered, and of other packages."""
    return tuple(dict.fromkeys([*PROCESSES, *plugins.found(plugins.NOISE)]))


def _class(name: str) -> type[Any]:
    """ValueError for an unknown name."""
    if name not in known():
        raise ValueError(f"unknown noise {name!r}{nearest(name, known()) or ';'} known: {', '.join(known())}")
    if name not in PROCESSES:
        brought = plugins.load(plugins.NOISE, name)
        PROCESSES[name], SETTING[name] = brought, getattr(brought, "setting", "")
    return PROCESSES[name]


def name_of(process: type[Any]) -> str:
    """The name of a class. ValueError where it is not registered."""
    for name, one in PROCESSES.items():
        if process is one:
            return name
    raise ValueError(f"{process.__name__} has no name: dlm.noise.process.register_noise gives a noise process one")


def settings(noise: NoiseProcess) -> dict[str, Any]:
    """The entry of config.json that `make` turns into this process. ValueError for a class or a schedule that is not registered."""
    known = {"process": name_of(type(noise)), "schedule": schedule.word(noise.schedule)}
    if not is_dataclass(noise):
        raise ValueError(f"{type(noise).__name__} is no dataclass: its settings cannot be written down")
    own = [f for f in fields(noise) if f.name not in ("vocab_size", "mask_id", "schedule")]
    values = {f.name: getattr(noise, f.name) for f in own if f.name == "head" or getattr(noise, f.name) != f.default}
    return known | {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def parse(word: str) -> dict[str, Any]:
    """`"uniform"`, or with its setting `"hybrid:0.3"`, `"semantic:2"` -> entries of the settings. ValueError names the known ones."""
    name, colon, value = word.partition(":")
    _class(name)
    setting = SETTING.get(name, "")
    if colon and not setting:
        raise ValueError(f"{name} noise has no setting, got {word!r}")
    try:
        return {"process": name} | ({setting: float(value)} if colon else {})
    except ValueError:
        raise ValueError(f"noise {word!r}: {value!r} is no number") from None


def make(settings: Mapping[str, Any], vocab_size: int, mask_id: int) -> Process:
    """The process that config.json describes: process, schedule and the settings of that process. ValueError names the wrong one."""
    rest: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}  # JSON has lists
    name, alpha = rest.pop("process", ""), schedule.parse(rest.pop("schedule", "linear"))
    made = _class(name)
    if "clusters" in rest:
        rest["clusters"] = tuple(int(c) for c in rest["clusters"])
    try:
        return cast(Process, made(vocab_size, mask_id, alpha, **rest))  # one of your own keeps to the same protocol
    except TypeError as error:
        raise ValueError(f"{name} noise: {error}") from None
