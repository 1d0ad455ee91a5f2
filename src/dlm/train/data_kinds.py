"""Kinds of data that are not text, by the word or the file name that `--data` gives. Imports no torch until a kind is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dlm.grids import kinds

if TYPE_CHECKING:
    from dlm.text.tokenizer import Tokenizer
    from dlm.train.data import Stream


class DataKind(Protocol):
    """One data set of a kind, which reads its files when `stream` is called.

    unit: one token, as tables name it. settings: fields of `TrainConfig` and of its network that the data decides.
    """

    @property
    def unit(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...

    def tokenizer(self) -> Tokenizer:
        """One character for each token, so that a figure for each character is one for each token."""

    def stream(self, part: str, window: int, val_fraction: float) -> Stream:
        """part: `train`, `val` or `all`. InputError for files that are no such data, and for a part below one window."""


@dataclass(frozen=True)
class Entry:
    """words: `--data WORD` or `--data WORD:SETTING`; suffixes: of files, which may also end in .gz. make: from the whole source; None where
    it names something else. written: the source in a help text. recipe: for a run that is named by its data alone."""

    make: Callable[[str], DataKind | None]
    written: str
    words: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    recipe: str = ""

    def has(self, source: str) -> bool:
        name = source.lower().removesuffix(".gz")
        return source.partition(":")[0] in self.words or (name.endswith(self.suffixes) and not source.startswith("hf:"))


def _grid(source: str) -> DataKind | None:
    from dlm.train import grids

    return grids.find(source)


def _dna(source: str) -> DataKind:
    from dlm.train import dna

    return dna.find(source)


def _chorales(source: str) -> DataKind:
    from dlm.train import chorales

    return chorales.find(source)


def _arc(source: str) -> DataKind:
    from dlm.train import arc

    return arc.find(source)


def _array(source: str) -> DataKind:
    from dlm.train import arrays

    return arrays.find(source)


KINDS: dict[str, Entry] = {
    "grids": Entry(_grid, "sudoku[:SIZE], maze[:SIZE]", words=tuple(kinds.KINDS)),
    "dna": Entry(_dna, "a .fa, .fasta or .fna file of DNA", suffixes=(".fa", ".fasta", ".fna"), recipe="dna"),
    "arc": Entry(_arc, "arc:TASKS, arc-rules[:SIZE[:RULE]]", words=("arc", "arc+demonstrations", "arc-rules"), recipe="arc"),
    "arrays": Entry(_array, "a .npy file of integers", suffixes=(".npy",)),
    "chorales": Entry(_chorales, "chorales[:SCORES]", words=("chorales",), suffixes=(".mxl", ".musicxml"), recipe="chorales"),
}
"""A kind of data is one file and one entry."""

SOURCES = ", ".join(kind.written for kind in KINDS.values())
"""For a help text."""


def entry(source: str) -> Entry | None:
    """The kind that a source belongs to; None for text."""
    return next((one for one in KINDS.values() if one.has(source)), None)


def find(source: str) -> DataKind | None:
    """The data that a source names; None for text. InputError for a setting that there is not."""
    return None if (found := entry(source)) is None else found.make(source)


def is_word(source: str) -> bool:
    """Whether it names a kind by a word, and no file."""
    found = entry(source)
    return found is not None and source.partition(":")[0] in found.words
