"""The exchange types: the input of a sampler (Canvas), its output after a step (Frame), and a whole run kept small (Trajectory).

Shapes: B rows, T positions, E changes, S frames.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlm.errors import InputError
from dlm.files import check_stamp, check_types, parse_json, replacing, stamp
from dlm.spelling import MASK, Spelling

KIND = "dlm-trajectory-1"  # tells the file from other safetensors files
FORMAT = 1
COLOUR = re.compile("(#[0-9a-f]{6})?")
"""Of a token in a grid that is drawn in colours; nothing for none."""


@dataclass(frozen=True)
class Canvas:
    """A batch of texts with holes: a prompt, an infill and a batch of both are the same thing.

    tokens_BT: int64 token ids; those at free positions are ignored.
    free_BT:   bool, True where the sampler writes.
    valid_BT:  bool, False at padding, which lies on the right.
    """

    tokens_BT: Tensor
    free_BT: Tensor
    valid_BT: Tensor

    def __post_init__(self) -> None:
        if not self.tokens_BT.shape == self.free_BT.shape == self.valid_BT.shape or self.tokens_BT.dim() != 2:
            raise ValueError("tokens_BT, free_BT and valid_BT need one shape (B, T)")
        if bool((self.free_BT & ~self.valid_BT).any()):
            raise ValueError("a free position lies in the padding")

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int | None]], *, fill: int) -> Canvas:
        """One list of token ids a row, None for a hole; shorter rows are padded on the right with `fill`."""
        if not rows or not any(len(row) for row in rows):
            raise InputError("an empty canvas: give a prompt or a length above 0")
        width = max(len(row) for row in rows)
        tokens_BT = torch.full((len(rows), width), fill, dtype=torch.long)
        free_BT = torch.zeros(len(rows), width, dtype=torch.bool)
        valid_BT = torch.zeros(len(rows), width, dtype=torch.bool)
        for b, row in enumerate(rows):
            tokens_BT[b, : len(row)] = torch.tensor([fill if x is None else x for x in row], dtype=torch.long)
            free_BT[b, : len(row)] = torch.tensor([x is None for x in row], dtype=torch.bool)
            valid_BT[b, : len(row)] = True
        return cls(tokens_BT, free_BT, valid_BT)

    @property
    def given_BT(self) -> Tensor:
        """bool (B, T), True where a token stands from the start."""
        return self.valid_BT & ~self.free_BT

    def to(self, device: torch.device | str) -> Canvas:
        return Canvas(self.tokens_BT.to(device), self.free_BT.to(device), self.valid_BT.to(device))


class Likely(NamedTuple):
    """The likeliest tokens at some positions, the first the likeliest: row_E, position_E, token_EC, weight_EC (C of each, E positions)."""

    row: Tensor
    position: Tensor
    token: Tensor
    weight: Tensor

    def at_row(self, row: int) -> dict[int, list[tuple[int, float]]]:
        """(token, weight) of the likeliest tokens of a row by position."""
        mine_E = self.row == row
        columns = zip(*(part[mine_E].tolist() for part in (self.position, self.token, self.weight)), strict=True)
        return {position: list(zip(tokens, weights, strict=True)) for position, tokens, weights in columns}


@dataclass(frozen=True)
class Frame:
    """The state after one step. `settled` is a promise: the sampler does not change that position again.

    t_B: noise level each row has reached (1 noise, 0 data); model: key of the model that took the step;
    forwards: forward passes so far in this run (one for the whole batch counts once), 0 for the noise that a run starts from.
    saved_B: steps that each row has not taken because its text had settled; doubt_B: how many of the tokens that were left
    alone so the model expects to change, by its own probabilities.
    draft_BT: draft tokens at open positions, which the next forward pass verifies, -1 elsewhere; None from a sampler without drafts.
    likely: of positions where several tokens are possible, from a sampler that makes all of them clearer together.
    """

    tokens_BT: Tensor
    settled_BT: Tensor
    t_B: Tensor
    model: str
    forwards: int
    saved_B: Tensor | None = None
    doubt_B: Tensor | None = None
    draft_BT: Tensor | None = None
    likely: Likely | None = None


Places = tuple[Tensor, Tensor, Tensor]
"""(row_E, position_E, token_E)"""


class Trajectory:
    """The frames of one run, stored as the changes between them.

    Grows by `append`; frame 0 is the canvas before the first step. pieces: how tokens spell text, or the text of each by its id.
    drafted_B: draft tokens verified so far in each row; accepted_B: those of them that were accepted.
    """

    def __init__(
        self,
        tokens_BT: Tensor,
        canvas: Canvas,
        *,
        pieces: Spelling | Mapping[int, str],
        mask_id: int | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.start_BT = tokens_BT.cpu().clone()
        self.free_BT, self.valid_BT = canvas.free_BT.cpu(), canvas.valid_BT.cpu()
        self.spelling = pieces if isinstance(pieces, Spelling) else Spelling.of(pieces, mask_id)
        self.mask_id, self.meta = mask_id, dict(meta or {})
        self.t_SB: list[list[float]] = [[1.0] * len(tokens_BT)]
        self.models: list[str] = [""]
        self.forwards: list[int] = [0]
        self.seconds: list[float] = [0.0]
        self.current_BT = self.start_BT.clone()
        self.changed_BT = torch.zeros_like(self.start_BT)  # frame of the last change, 0 = never
        self.settled_BT = torch.full_like(self.start_BT, -1)  # frame of the promise, -1 = not yet
        self.settled_BT[~self.free_BT] = 0
        self._events: list[Places] = []  # of frame 1, 2, ...
        self._drafts: list[Places] = [_nowhere()]  # of frame 0, 1, ...
        self._likely: list[Likely | None] = [None]  # of frame 0, 1, ...
        self.has_drafts = False
        self.drafted_B = torch.zeros(len(tokens_BT), dtype=torch.long)
        self.accepted_B = torch.zeros(len(tokens_BT), dtype=torch.long)
        self._born = time.perf_counter()

    def __len__(self) -> int:
        """Number of frames, the start included."""
        return len(self.forwards)

    def append(self, frame: Frame, *, seconds: float | None = None) -> None:
        """Add a frame; `seconds` since the run began defaults to the clock. One before the first forward pass replaces the start."""
        k, tokens_BT = len(self), frame.tokens_BT.cpu()
        if tokens_BT.shape != self.current_BT.shape:
            raise ValueError(f"frame of shape {tuple(tokens_BT.shape)} in a trajectory of {tuple(self.current_BT.shape)}")
        if frame.forwards == 0 and k == 1:
            self.start_BT, self.current_BT = tokens_BT.clone(), tokens_BT.clone()
            return
        rows, positions = (tokens_BT != self.current_BT).nonzero(as_tuple=True)
        self._events.append((rows, positions, tokens_BT[rows, positions]))
        if self.has_drafts:
            self._tally(tokens_BT)
        self.has_drafts |= frame.draft_BT is not None
        self._drafts.append(_nowhere() if frame.draft_BT is None else _places(frame.draft_BT.cpu()))
        self._likely.append(None if frame.likely is None else Likely(*(part.cpu() for part in frame.likely)))
        self.current_BT = tokens_BT.clone()
        self.changed_BT[rows, positions] = k
        self.settled_BT[frame.settled_BT.cpu() & (self.settled_BT < 0)] = k
        self.t_SB.append(frame.t_B.cpu().double().tolist())
        self.models.append(frame.model)
        self.forwards.append(frame.forwards)
        self.seconds.append(time.perf_counter() - self._born if seconds is None else seconds)

    def _tally(self, tokens_BT: Tensor) -> None:
        """Count the draft tokens of the last frame, and those that the next one accepts."""
        rows, positions, tokens = self._drafts[-1]
        self.drafted_B += torch.bincount(rows, minlength=len(tokens_BT))
        self.accepted_B += torch.bincount(rows[tokens_BT[rows, positions] == tokens], minlength=len(tokens_BT))

    def changes(self, k: int) -> Places:
        """The changes of frame k against frame k - 1; none for frame 0."""
        return self._events[k - 1] if k else _nowhere()

    def drafts(self, k: int) -> Places:
        """The draft tokens of frame k, which the forward pass after it verifies."""
        return self._drafts[k]

    def rejected(self, k: int) -> Places:
        """The draft tokens of frame k - 1 that frame k rejected, row by row from the left."""
        rows, positions, tokens = self._drafts[k - 1] if k else _nowhere()
        written_BT = torch.full_like(self.start_BT, -1)
        changed, at, new = self.changes(k)
        written_BT[changed, at] = new
        wrong = written_BT[rows, positions] != tokens
        return rows[wrong], positions[wrong], tokens[wrong]

    @property
    def has_blends(self) -> bool:
        """Whether some frame tells the likeliest tokens of its positions."""
        return any(likely is not None for likely in self._likely)

    def likely(self, k: int, row: int) -> dict[int, list[tuple[int, float]]]:
        """(token, weight) of the likeliest tokens of frame k by position; none where it does not tell them."""
        found = self._likely[k]
        return {} if found is None else found.at_row(row)

    def frames(self) -> Iterator[Frame]:
        """Every frame from the start to the last, rebuilt from the changes."""
        tokens_BT = self.start_BT.clone()
        for k in range(len(self)):
            rows, positions, tokens = self.changes(k)
            tokens_BT[rows, positions] = tokens
            settled_BT = (self.settled_BT >= 0) & (self.settled_BT <= k)
            draft_BT = None
            if self.has_drafts and k:
                draft_BT = torch.full_like(tokens_BT, -1)
                rows, positions, tokens = self._drafts[k]
                draft_BT[rows, positions] = tokens
            t_B = torch.tensor(self.t_SB[k])
            yield Frame(tokens_BT.clone(), settled_BT, t_B, self.models[k], self.forwards[k], draft_BT=draft_BT, likely=self._likely[k])

    def settle_step(self) -> Tensor:
        """int64 (B, T): the frame of each position's last change, 0 where it never changed."""
        return self.changed_BT.clone()

    def piece(self, token: int, mask: str = MASK) -> str:
        """The text of one token by itself; `shown` joins the tokens of a character."""
        return self.spelling.alone(token, mask)

    def shown(self, row: int = 0, tokens_T: Tensor | None = None, mask: str = MASK) -> list[str]:
        """The text shown at each position of a row, padding left out: of the last frame, or with other tokens (T,)."""
        tokens_T = self.current_BT[row] if tokens_T is None else tokens_T
        return self.spelling.draw(tokens_T[self.valid_BT[row]].tolist(), mask)

    def text(self, row: int = 0, mask: str = MASK) -> str:
        """The last frame of one row."""
        return "".join(self.shown(row, mask=mask))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, to a temporary name first."""
        tensors = _packed(self._events)
        if self.has_drafts:  # a file of a run without drafts has no such keys; `proposed` is their name in every file since the first
            tensors |= {f"proposed_{name}": tensor for name, tensor in _packed(self._drafts).items()}
        tensors |= _packed_likely(self._likely) if self.has_blends else {}
        tensors |= {"start": self.start_BT.to(torch.int32), "settled": self.settled_BT.to(torch.int32)}
        tensors |= {"free": self.free_BT.contiguous(), "valid": self.valid_BT.contiguous()}
        tensors["t"] = torch.tensor(self.t_SB)
        used = {
            token
            for name in ("start", "token", "proposed_token", "likely_token")
            if name in tensors
            for token in tensors[name].flatten().tolist()
        }
        header = {
            **self.spelling.record(used),
            "mask_id": self.mask_id,
            "models": self.models,
            "forwards": self.forwards,
            "seconds": [round(s, 6) for s in self.seconds],
            "meta": self.meta,
        }
        with replacing(Path(path)) as partial:
            save_file(tensors, partial, metadata={"format": KIND, "header": json.dumps(stamp(FORMAT) | header)})

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read a file that `save` wrote. InputError for a file that is something else, damaged, or of a later format."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != KIND:
                    raise InputError(f"{path} is not a trajectory saved by dlm")
                header = parse_json(metadata["header"], path)
                check_stamp(header, FORMAT, path)
                check_types(_Header, header, path)
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            return cls._from_file(tensors, header)
        except InputError:
            raise
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path} is not a whole trajectory file ({reason}); make it again with --save") from None

    @classmethod
    def _from_file(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Trajectory:
        _check_tensors(tensors)
        start_BT = tensors["start"].long()
        self = cls(
            start_BT,
            Canvas(start_BT, tensors["free"], tensors["valid"]),
            pieces=Spelling.from_record(header, header["mask_id"]),
            mask_id=header["mask_id"],
            meta=header["meta"],
        )
        events = _unpacked(tensors, "")
        self.has_drafts = "proposed_count" in tensors
        drafts = _unpacked(tensors, "proposed_") if self.has_drafts else [_nowhere()] * (len(events) + 1)
        self._drafts = drafts[:1]
        for (rows, positions, tokens), drafted in zip(events, drafts[1:], strict=True):
            self._events.append((rows, positions, tokens))
            self.current_BT[rows, positions] = tokens
            self.changed_BT[rows, positions] = len(self._events)
            self._tally(self.current_BT)
            self._drafts.append(drafted)
        self._likely = _unpacked_likely(tensors, len(events) + 1)
        self.settled_BT = tensors["settled"].long()
        if self.settled_BT.numel() and int(self.settled_BT.max()) > len(events):
            raise ValueError("a token settled after the last frame")
        if not all(map(math.isfinite, header["seconds"])):
            raise ValueError("a time is no number")
        self.t_SB, self.models = tensors["t"].tolist(), header["models"]
        self.forwards, self.seconds = header["forwards"], header["seconds"]
        lengths = {len(column) for column in (self.t_SB, self.models, self.forwards, self.seconds)}
        if lengths != {len(events) + 1} or self.settled_BT.shape != start_BT.shape or tensors["t"].shape[1:] != start_BT.shape[:1]:
            raise ValueError("its parts differ in length")
        return self


@dataclass(frozen=True)
class _Header:
    """The types of the header of a file."""

    pieces: dict[str, str]
    bytes: dict[str, str]
    first: dict[str, str]
    mask_id: int | None
    models: list[str]
    forwards: list[int]
    seconds: list[float]
    meta: dict[str, Any]


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """ValueError for tensors that no run has written: of another type or shape, or with places or tokens that lie outside."""
    rows, length = tensors["start"].shape
    for name, tensor in tensors.items():
        wanted = torch.bool if name in ("free", "valid") else torch.float64 if name == "t" else torch.int32
        wanted = torch.float32 if name == "likely_weight" else wanted
        if tensor.dtype != wanted and not (name == "t" and tensor.dtype == torch.float32):
            raise ValueError(f"{name} is of type {tensor.dtype}, not {wanted}")
        limits = {"row": rows, "position": length}
        most = limits.get(name.removeprefix("proposed_").removeprefix("likely_"), 2**31)
        least = -1 if name == "settled" else 0
        if wanted == torch.int32 and tensor.numel() and not (least <= int(tensor.min()) and int(tensor.max()) < most):
            raise ValueError(f"{name} lies outside {least} .. {most - 1}")
    if not bool(tensors["t"].isfinite().all()):
        raise ValueError("a noise level is no number")


def _nowhere() -> Places:
    none = torch.zeros(0, dtype=torch.long)
    return none, none, none


def _places(token_BT: Tensor) -> Places:
    """The positions that hold a token; -1 is none."""
    rows, positions = (token_BT >= 0).nonzero(as_tuple=True)
    return rows, positions, token_BT[rows, positions]


def _packed(events: Sequence[Places]) -> dict[str, Tensor]:
    """All of them end to end, and how many belong to each frame; `_unpacked` takes them apart."""
    columns = list(zip(*(events or [_nowhere()]), strict=True))
    tensors = {name: torch.cat(column).to(torch.int32) for name, column in zip(("row", "position", "token"), columns, strict=True)}
    return tensors | {"count": torch.tensor([len(rows) for rows, _, _ in events], dtype=torch.int32)}


def _unpacked(tensors: Mapping[str, Tensor], prefix: str) -> list[Places]:
    counts = tensors[f"{prefix}count"].tolist()
    columns = (torch.split(tensors[prefix + name].long(), counts) for name in ("row", "position", "token"))
    return list(zip(*columns, strict=True))


def _packed_likely(found: Sequence[Likely | None]) -> dict[str, Tensor]:
    """All of them end to end, and how many positions belong to each frame."""
    told = [likely for likely in found if likely is not None]
    parts = {f"likely_{name}": torch.cat([getattr(likely, name) for likely in told]) for name in Likely._fields}
    kinds = {name: torch.float32 if name == "likely_weight" else torch.int32 for name in parts}
    counts = torch.tensor([0 if likely is None else len(likely.row) for likely in found], dtype=torch.int32)
    return {name: part.to(kinds[name]).contiguous() for name, part in parts.items()} | {"likely_count": counts}


def _unpacked_likely(tensors: Mapping[str, Tensor], frames: int) -> list[Likely | None]:
    if "likely_count" not in tensors:
        return [None] * frames
    counts = tensors["likely_count"].tolist()
    columns = [torch.split(tensors[f"likely_{name}"], counts) for name in Likely._fields]
    if len(counts) != frames or not bool(tensors["likely_weight"].isfinite().all()):
        raise ValueError("its likely tokens are not those of its frames")
    return [
        Likely(row.long(), at.long(), token.long(), weight) if len(row) else None for row, at, token, weight in zip(*columns, strict=True)
    ]
