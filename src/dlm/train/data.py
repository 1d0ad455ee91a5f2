"""Text -> one stream of tokens -> windows.

A batch is a function of (seed, step) alone, so a resumed run needs no reader state. Shapes: N tokens, B rows, T window.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dlm import bundled
from dlm.errors import InputError
from dlm.files import read_text
from dlm.text.tokenizer import Tokenizer


def read(source: str) -> list[str]:
    """Documents of a bundled data set, a text file, every .txt below a folder, or a Hugging Face data set.

    A bundled name means the same text everywhere: a local file of that name is `./NAME`. A Hugging Face data set is `hf:NAME`,
    `hf:NAME:COLUMN` or `hf:NAME:COLUMN:SPLIT` (defaults: text, train). InputError where there is no text.
    """
    if source.startswith("hf:"):
        name, column, part, *more = *source[3:].split(":"), "", ""
        if not name or any(more):
            raise InputError(f"{source} does not name a data set: write hf:NAME, hf:NAME:COLUMN or hf:NAME:COLUMN:SPLIT")
        documents = _read_dataset(name, column or "text", part or "train")
    else:
        documents = _read_files(source)
    if not any(documents):
        raise InputError(f"{source} is empty: give text to learn from")
    return documents


def _read_files(source: str) -> list[str]:
    return [read_text(file) for file in bundled.text_files(source)]


def _read_dataset(name: str, column: str, split: str) -> list[str]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError("Hugging Face data sets need the data extra: pip install 'dlm[data]'") from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many kinds: network, name, format
        raise InputError(f"data set {name!r} could not be loaded: {(str(error) or repr(error)).splitlines()[0]}") from None
    if column not in rows.column_names:
        raise InputError(f"data set {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
    return [str(text) for text in rows[column] if text is not None]


def split(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """First part trains, last part validates: by characters of a single text, by documents where there are many."""
    if len(documents) >= 100:
        cut = round(len(documents) * (1 - val_fraction))
        return documents[:cut], documents[cut:]
    text = "\n".join(documents)
    cut = int(len(text) * (1 - val_fraction))
    return [text[:cut]], [text[cut:]]


def select(documents: list[str], part: str, val_fraction: float) -> list[str]:
    """The `train` or `val` part of the split, or `all`."""
    if part == "all":
        return documents
    if part not in ("train", "val"):
        raise InputError(f"unknown split {part!r}; known: train, val, all")
    return split(documents, val_fraction)[part == "val"]


@dataclass(frozen=True)
class Stream:
    """A token stream and the windows cut from it.

    pieces: lengths of the pieces that the tokens are, of which no window holds two; none: one piece. augment: whether a draw comes under
    the symmetries of its kind of data, if it has any. varies: whether draws of one window
    differ so much that a small data set is not learned by heart. colours: as of `ModelConfig`.
    """

    varies: ClassVar[bool] = False
    colours: ClassVar[tuple[str, ...]] = ()
    tokens_N: np.ndarray
    window: int
    name: str = "data"
    pieces: tuple[int, ...] = ()
    augment: bool = True

    def __post_init__(self) -> None:
        if max(self.lengths, default=0) < self.window:
            raise InputError(
                f"the {self.name} has {max(self.lengths, default=0)} tokens{' in its longest piece' if self.pieces else ''}, less than one "
                f"window of {self.window}: more text or a smaller window (--set window=64)"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the pieces, in their order."""
        return self.pieces or (len(self.tokens_N),)

    @classmethod
    def encode(cls, documents: list[str], tokenizer: Tokenizer, window: int, name: str = "data") -> Stream:
        """Documents one after another, a newline between them."""
        lines = [document + "\n" for document in documents[:-1]] + documents[-1:]
        return cls(tokenizer.encode_corpus(lines), window, name)

    def draw(self, batch: int, rng: torch.Generator) -> Tensor:
        """Windows at uniformly random places, int64 (B, T)."""
        places_P = np.maximum(np.array(self.lengths) - self.window + 1, 0).cumsum()  # in all pieces up to this one
        drawn_B = torch.randint(int(places_P[-1]), (batch,), generator=rng).numpy()
        piece_B = np.searchsorted(places_P, drawn_B, side="right")
        starts_B = drawn_B + self._begins()[piece_B] - np.append(0, places_P)[piece_B]
        tokens_BT = self.tokens_N[starts_B[:, None] + np.arange(self.window)]
        rows_BT = torch.from_numpy(tokens_BT.astype(np.int64))
        return self.varied(rows_BT, rng) if self.augment else rows_BT

    def varied(self, rows_BT: Tensor, rng: torch.Generator) -> Tensor:
        """Each row under a random symmetry of its own; a text has none."""
        return rows_BT

    def free(self, x_BT: Tensor, free_BT: Tensor, share: float, rng: torch.Generator) -> Tensor:
        """The positions of x to predict, of those that the objective leaves free: of a text all. share: of rows with a condition."""
        return free_BT

    def windows(self, most: int | None = None) -> Tensor:
        """Whole windows side by side from the start of each piece, int64 (W, T), `most` of them spread evenly over the text.

        The last tokens that fill no window are left out.
        """
        parts = [
            self.tokens_N[begin : begin + length // self.window * self.window].reshape(-1, self.window)
            for begin, length in zip(self._begins(), self.lengths, strict=True)
        ]
        rows_WT = np.concatenate(parts)
        count = len(rows_WT)
        if most is not None and most < count:  # the beginning of a text is not like its end
            rows_WT = rows_WT[np.linspace(0, count - 1, most).round().astype(np.int64)]
        return torch.from_numpy(rows_WT.astype(np.int64))

    def _begins(self) -> np.ndarray:
        return np.cumsum((0, *self.lengths[:-1]))

    def fingerprint(self) -> str:
        """sha256 of the tokens, 16 hex digits."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens_N, dtype=np.int32).tobytes()).hexdigest()[:16]
