"""Errors that a user can mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MAX_SETTING = 1e9
"""The bound of settings of samplers that have no natural one."""


class InputError(ValueError):
    """The input cannot be used as it is; the message is one line that says what to do. The command line exits with 2."""


def in_range(value: float, low: float, high: float, what: str, *, above: bool = False) -> None:
    """InputError unless value lies in low .. high; above: without low itself."""
    if not low <= value <= high or (above and value == low):
        raise InputError(f"{what} must be {'above' if above else 'at least'} {low:g} and at most {high:g}, got {value}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest in spelling, nothing where none is close: the end of a message."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not among the known ones of its kind: an option, a sampler, a drafter, a data set."""
    names = list(known)
    return InputError(f"unknown {kind} {name!r}{nearest(name, names) or ';'} known: {', '.join(names)}")
