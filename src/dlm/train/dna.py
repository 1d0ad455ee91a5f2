"""DNA in training: FASTA files as runs of A, C, G and T, each draw from either strand.

A header line `>name` begins a record. Case is folded and U reads as T. N, the other IUPAC codes of several bases, and gaps end a run.
No window crosses the end of a run, and nothing is put in the place of such a code. Shapes: N bases, B rows, T positions.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.files import check_there
from dlm.text.tokenizer import Tokenizer
from dlm.train.data import Stream

BASES = "ACGT"  # in this order the complement of base i is 3 - i
SEVERAL = "RYSWKMBDHVN"  # IUPAC codes of two bases or more
GAPS = "-."
END = len(BASES)  # beside the bases in CODES: what ends a run


def _codes() -> np.ndarray:
    made = np.full(256, END, dtype=np.int32)
    for base, letters in enumerate(("A", "C", "G", "TU")):
        made[list((letters + letters.lower()).encode())] = base
    return made


CODES = _codes()
"""By the byte of a letter."""
KNOWN = (BASES + "U" + SEVERAL + (BASES + "U" + SEVERAL).lower() + GAPS + " \t").encode()


def complement(x_BT: Tensor) -> Tensor:
    """The other strand of each row, which is read backwards."""
    return (len(BASES) - 1 - x_BT).flip(-1)


@dataclass(frozen=True)
class BaseStream(Stream):
    """Bases, of which each draw is read from either strand."""

    def varied(self, rows_BT: Tensor, rng: torch.Generator) -> Tensor:
        """Each row or its reverse complement."""
        return torch.where(torch.rand(len(rows_BT), 1, generator=rng) < 0.5, complement(rows_BT), rows_BT)


@dataclass(frozen=True)
class Fasta:
    """A FASTA file of DNA or RNA, which may be compressed by gzip."""

    path: Path
    unit: ClassVar[str] = "base"
    settings: ClassVar[dict[str, Any]] = {}

    def tokenizer(self) -> Tokenizer:
        """A token for each base."""
        return Tokenizer.characters(BASES)

    @cached_property
    def runs(self) -> list[np.ndarray]:
        """The bases of every run, int32 (N,). InputError for what is no FASTA file of DNA."""
        found = [run for _, letters in records(read(self.path), self.path) for run in runs_of(letters)]
        if not found:
            raise InputError(f"{self.path} holds no A, C, G or T: give a FASTA file of DNA")
        return found

    def stream(self, part: str, window: int, val_fraction: float) -> BaseStream:
        """The first bases train, the last `val_fraction` of them validate. Runs shorter than a window are left out."""
        total = sum(map(len, self.runs))
        cut = int(total * (1 - val_fraction))
        parts = {"train": (0, cut, "training part"), "val": (cut, total, "validation part"), "all": (0, total, "whole")}
        if part not in parts:
            raise InputError(f"unknown split {part!r}; known: train, val, all")
        begin, end, name = parts[part]
        runs = between(self.runs, begin, end)
        runs = [run for run in runs if len(run) >= window] or runs  # without any, the stream tells how long the longest is
        tokens_N = np.concatenate([np.empty(0, np.int32), *runs])
        return BaseStream(tokens_N, window, f"{name} of {self.path}", tuple(map(len, runs)))


def find(source: str) -> Fasta:
    """The FASTA file of this path."""
    return Fasta(Path(source))


def read(path: Path) -> bytes:
    """The file, decompressed where its name ends in .gz. InputError where it is missing or damaged."""
    check_there(path, "give a FASTA file of DNA")
    data = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is no file of gzip ({error}): fetch it again, or unpack it") from None


def records(data: bytes, path: Path) -> Iterator[tuple[str, bytes]]:
    """The name and the letters of every record. path: for messages. InputError for letters before the first header, and for odd ones."""
    name = ""
    lines: list[bytes] | None = None
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if line.startswith(b">"):
            if lines is not None:
                yield name, b"".join(lines)
            name, lines = b"".join(line[1:].split(maxsplit=1)[:1]).decode("utf-8", "replace"), []
        elif line.startswith(b";") or not line.strip():  # a comment of old files
            continue
        elif lines is None:
            raise InputError(f"{path}, line {number}: letters before the first header; a FASTA record begins with a line >NAME")
        else:
            if odd := line.translate(None, KNOWN):
                letter = odd.decode("utf-8", "replace")[0]
                raise InputError(
                    f"{path}, line {number}, record {name!r}: {letter!r} is no code of a base; known are {BASES}, U, {SEVERAL}"
                )
            lines.append(b"".join(line.split()))
    if lines is not None:
        yield name, b"".join(lines)


def runs_of(letters: bytes) -> list[np.ndarray]:
    """The runs of bases between other codes, none of them empty."""
    codes_N = CODES[np.frombuffer(letters, np.uint8)]
    parts = np.split(codes_N, np.flatnonzero(codes_N == END))
    return [part for part in (parts[0], *(part[1:] for part in parts[1:])) if len(part)]


def between(runs: Sequence[np.ndarray], begin: int, end: int) -> list[np.ndarray]:
    """The bases from number `begin` to before number `end` of all runs; a run may be cut."""
    ends = np.cumsum([len(run) for run in runs])
    cut = (run[max(0, begin - last + len(run)) : max(0, end - last + len(run))] for run, last in zip(runs, ends, strict=True))
    return [run for run in cut if len(run)]
