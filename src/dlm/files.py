"""Files that a reader never sees half written, JSON that is checked when it is read, and the format numbers of files."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dlm
from dlm.errors import InputError

PREFIX = ".saving-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, on the same disk: renamed to `path` at the end, removed where something fails.

    The file is on disk before it gets its name. It has the permissions of the file that it replaces, else those of any new file.
    """
    with replacing_files(path.parent) as temporary:
        yield temporary / path.name


@contextmanager
def replacing_files(directory: Path, order: Callable[[Path], Any] = str) -> Iterator[Path]:
    """A temporary directory inside `directory`, from which all files move out at the end, each as with `replacing`.

    order: key of the files' order, so that a reader who finds the last one finds all others. InputError where there is no such directory.
    """
    check_directory(directory)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=directory) as temporary:
        probe = Path(temporary) / ".mode"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        with _system_errors(directory):
            yield Path(temporary)
        for partial in sorted(Path(temporary).iterdir(), key=order):
            path = directory / partial.name
            _install(partial, path, path.stat().st_mode if path.is_file() else mode)


@contextmanager
def _system_errors(directory: Path) -> Iterator[None]:
    """An error of the system that safetensors tells in words, as a full disk, raised as the OSError that it is."""
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(directory)) from None


def check_directory(directory: Path) -> None:
    """InputError where there is no such directory to write into."""
    if not directory.is_dir():
        raise InputError(f"there is no directory {directory} to write into: make it first")


def check_there(path: Path, hint: str) -> None:
    """InputError where there is no such file to read; hint: how to come by it."""
    if not path.is_file():
        raise InputError(f"no file {path}: {hint}")


def check_target(path: Path, *, makes: bool = False) -> None:
    """InputError where no file can be written at this path: before the work, so that its result is not lost.

    makes: whether the directory is made where there is none.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory: give the name of a file to write")
    place = path.parent
    while makes and not place.exists():
        place = place.parent
    check_directory(place)
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{place} may not be written to: choose another directory")


def _install(partial: Path, path: Path, mode: int) -> None:
    with partial.open("r+b") as file:
        os.fsync(file.fileno())
    partial.chmod(mode & 0o777)  # safetensors writes for the owner alone
    os.replace(partial, path)


def sweep(directory: Path) -> None:
    """Remove the temporary files of a process that was killed while it saved."""
    for left in directory.glob(f"{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """UTF-8, by `replacing`. errors: as of `str.encode`."""
    write_bytes(path, text.encode("utf-8", errors))


def write_bytes(path: Path, data: bytes) -> None:
    """By `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def read_json(path: Path) -> Any:
    """The value that a JSON file holds. InputError where it is missing or damaged, nested too deep, or has an integer too long."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except RecursionError:
        raise InputError(f"{path} is damaged (it is nested too deep)") from None
    except ValueError as error:  # damaged JSON or UTF-8, and integers of more than 4,300 digits
        raise InputError(f"{path} is damaged ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds, empty where there is no such file. InputError for anything else."""
    data = read_json(path) if path.is_file() else {}
    if not isinstance(data, dict):
        raise InputError(f"{path} is damaged (it holds a {type(data).__name__})")
    return data


def stamp(number: int) -> dict[str, Any]:
    """The entries of a file that say in which format and by which version of dlm it was written."""
    return {"format": number, "dlm_version": dlm.__version__}


def check_stamp(data: Mapping[str, Any], newest: int, path: str | Path) -> int:
    """The format number of a file's contents; 0 for a file from before there were any. InputError for one newer than `newest`."""
    number, writer = data.get("format", 0), data.get("dlm_version")
    if not isinstance(number, int) or number < 0:
        raise InputError(f"{path} is damaged (its format is {number!r})")
    if number > newest:
        by = f"dlm {writer}" if isinstance(writer, str) else "a later version of dlm"
        raise InputError(f"{path} has format {number}, which {by} writes; dlm {dlm.__version__} reads up to {newest}: upgrade dlm")
    return number
