"""Files that a reader never sees half written, JSON that is checked when it is read, and the format numbers of files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import dlm
from dlm.errors import InputError

PREFIX = ".saving-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, on the same disk: renamed to `path` at the end, removed where something fails.

    The file is on disk before it gets its name. It has the permissions of the file that it replaces, else those of any new file.
    """
    with replacing_files(path.parent, of=path.name) as temporary:
        yield temporary / path.name


@contextmanager
def replacing_files(directory: Path, order: Callable[[Path], Any] = str, of: str = "") -> Iterator[Path]:
    """A temporary directory inside `directory`, from which all files move out at the end, each as with `replacing`.

    order: key of the files' order, so that a reader who finds the last one finds all others. of: the name of what is saved; what a
    killed process left of an earlier save of it is removed first. InputError where there is no such directory.
    """
    check_directory(directory)
    prefix = f"{PREFIX}{hashlib.sha256(of.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}-"
    sweep(directory, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=directory) as temporary, _held(Path(temporary)):
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


def sweep(directory: Path, prefix: str = PREFIX) -> None:
    """Remove the temporary files of processes that were killed while they saved; a process that saves now holds its own."""
    for left in directory.glob(f"{prefix}*"):
        with _held(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _held(directory: Path) -> Iterator[bool]:
    """Holds a lock on a directory, which ends with the process at the latest. Gives whether it was free."""
    if fcntl is None:
        yield True
        return
    try:
        file = os.open(directory, os.O_RDONLY)
    except OSError:  # another process has removed it, or owns it
        yield False
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(file)


def read_text(path: Path) -> str:
    """A text of UTF-8, without a byte order mark. InputError for bytes that are none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}){_remedy(error.object)}") from None


def _remedy(data: bytes) -> str:
    """The next step for a file of another kind: a document, an archive, or a text of another encoding."""
    if data.startswith(b"%PDF"):
        return ": it is a PDF, of which pdftotext takes the text"
    if data.startswith((b"PK", b"\x1f\x8b")):
        return ": it is an archive or an office document, save its text as a .txt file"
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return f": iconv -f {'UTF-16' if utf16 else 'WINDOWS-1252'} -t UTF-8 rewrites a text" if utf16 or b"\0" not in data else ""


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
        return parse_json(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged ({error})") from None


def parse_json(text: str, where: str | Path) -> Any:
    """The value of a JSON text, the one place where JSON of other hands is parsed. InputError as `read_json`. where: names it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where} is damaged (it is nested too deep)") from None
    except ValueError as error:  # damaged JSON, and integers of more than 4,300 digits
        raise InputError(f"{where} is damaged ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds, empty where there is no such file. InputError for anything else."""
    data = read_json(path) if path.is_file() else {}
    if not isinstance(data, dict):
        raise InputError(f"{path} is damaged (it holds a {type(data).__name__})")
    return data


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file that has one on each line, with the numbers of the lines; none where there is no file.

    A line that was cut short by a kill is passed over.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        with suppress(InputError):
            yield number, parse_json(line, path)


def append_json(path: Path, value: object) -> None:
    """Add a line to such a file at once; the line before it, if it was cut short, is ended."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read() == b"\n" else b"\n")
        file.write(json.dumps(value).encode() + b"\n")


def check_types(kind: type, data: Mapping[str, Any], where: str | Path, fault: str = "is damaged") -> None:
    """InputError for a value of JSON whose type is not that of the field of this dataclass which it is to be."""
    hints = get_type_hints(kind)
    for name in hints.keys() & data.keys():
        if not _is(data[name], hints[name]):
            told = repr(data[name])
            raise InputError(f"{where} {fault} ({name} is {told if len(told) < 60 else told[:60] + ' ...'}, not of type {hints[name]})")


def _is(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of this type; a whole number is a float, a truth value no number, a list a tuple."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if is_dataclass(hint):
        return isinstance(value, dict)
    if kind is Literal:
        return value in inner
    if kind in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if kind is dict:
        return isinstance(value, dict) and all(_is(key, inner[0]) and _is(one, inner[1]) for key, one in value.items())
    if kind in (list, tuple, Sequence):
        several = [one for one in inner if one is not Ellipsis]
        fits = len(several) == 1 or not isinstance(value, list | tuple) or len(several) == len(value)
        hints = several * len(value) if len(several) == 1 and isinstance(value, list | tuple) else several
        return isinstance(value, list | tuple) and fits and all(map(_is, value, hints))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind or hint)


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
