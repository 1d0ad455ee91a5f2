"""Samplers, noise processes and drafters that other packages bring: entry points by group, each loaded when its name is asked for."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any

from dlm.errors import InputError

SAMPLERS, NOISE, DRAFTERS = "dlm.samplers", "dlm.noise", "dlm.drafters"


@cache
def found(group: str) -> dict[str, metadata.EntryPoint]:
    """The entry points of a group by name, of every installed package."""
    return {entry.name: entry for entry in metadata.entry_points(group=group)}


@cache
def load(group: str, name: str) -> Any:
    """The object that an entry point names. InputError with the package's name where it cannot be imported."""
    entry = found(group)[name]
    try:
        return entry.load()
    except Exception as error:
        package = entry.dist.name if entry.dist is not None else "an installed package"
        raise InputError(f"{package} brings {name!r} as {group} {entry.value}, which cannot be imported: {error!r}") from None
