"""Four-part chorales on a grid of sixteenths: scores in MusicXML to tokens, windows of them, and tokens to MIDI.

A sixteenth of a voice is a token: the pitch of a note that begins there, HOLD where it goes on, or REST. Sixteenths follow one another,
each with its voices from soprano to bass, so that a position has a time and a voice.
Shapes: N tokens of all pieces, B rows, T positions of a window, S sixteenths, V = 4 voices.
"""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dlm.errors import InputError, unknown
from dlm.files import write_bytes
from dlm.text.tokenizer import Tokenizer
from dlm.train.data import Stream

VOICES = ("soprano", "alto", "tenor", "bass")
LOWEST, HIGHEST = 36, 81
"""Pitches as MIDI counts them: C2 to A5."""
HOLD, REST, FIRST = 0, 1, 2
"""Token ids; FIRST is the lowest pitch."""
SYMBOLS = "-." + "".join(chr(n) for n in (*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("t") + 1)))
SIXTEENTHS = 64
"""Of a window: four bars of four beats."""
BEAT = 4
LARGEST_SCORE_BYTES = 2**26
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, LookupError, ValueError, AttributeError, RuntimeError, OSError)
"""Raised by a damaged or encrypted archive, and by a score of an unknown encoding."""
TICKS = 120
"""Of MIDI, for a sixteenth."""
BEATS_A_MINUTE, CHOIR = 84, 52
STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


class _UnfitError(Exception):
    """Music that these tokens cannot write."""


def score(data: bytes, name: str) -> Tensor:
    """The tokens (S, V) of a score, MusicXML as it is or compressed (.mxl). InputError where it is none, or has no four voices that fit."""
    try:
        root = ET.fromstring(_unpacked(data) if data[:2] == b"PK" else data)
    except (ET.ParseError, *DAMAGED) as error:
        raise InputError(f"{name} is no score in MusicXML ({(str(error) or type(error).__name__).splitlines()[0]})") from None
    names = {part.get("id"): (part.findtext("part-name") or "").split()[:1] for part in root.iter("score-part")}
    parts = root.findall("part")
    by_voice = [[part for part in parts if [word.lower() for word in names.get(part.get("id"), [])] == [voice]] for voice in VOICES]
    chosen = [part for found in by_voice for part in found] if all(len(found) == 1 for found in by_voice) else parts
    if len(chosen) != len(VOICES):
        raise InputError(f"{name} has {len(parts)} parts: four are needed, soprano, alto, tenor and bass")
    try:
        voices = [list(_voice(part)) for part in chosen]
    except _UnfitError as error:
        raise InputError(f"{name}: {error}") from None
    except (ValueError, KeyError, ZeroDivisionError):
        raise InputError(f"{name}: a note whose pitch or duration cannot be read") from None
    if len({len(voice) for voice in voices}) != 1 or not voices[0]:
        raise InputError(f"{name}: its voices are {', '.join(str(len(voice)) for voice in voices)} sixteenths long, and not equally long")
    return torch.tensor(voices).T


def _unpacked(data: bytes) -> bytes:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        place = ET.fromstring(archive.read("META-INF/container.xml")).find(".//{*}rootfile").attrib["full-path"]  # type: ignore[union-attr]
        if archive.getinfo(place).file_size > LARGEST_SCORE_BYTES:
            raise OSError(f"more than {LARGEST_SCORE_BYTES} bytes")
        return archive.read(place)


def _voice(part: ET.Element) -> Iterator[int]:
    """The tokens of one part; repeats are read once."""
    divisions = Fraction(1)
    for element in part.iterfind("measure/*"):
        if element.tag == "attributes":
            divisions = Fraction(element.findtext("divisions") or divisions)
        if element.tag == "backup" or element.find("chord") is not None:
            raise _UnfitError("a voice has several notes at once")
        if element.tag not in ("note", "forward") or element.find("grace") is not None:
            continue
        length = 4 * Fraction(element.findtext("duration") or "") / divisions
        if length.denominator != 1 or length < 1:
            raise _UnfitError(f"a note of {length / 4} quarters does not fit on a grid of sixteenths")
        yield from _note(element, int(length))


def _note(element: ET.Element, length: int) -> list[int]:
    pitch = element.find("pitch")
    if pitch is None:
        return [REST] * length
    if any(tie.get("type") == "stop" for tie in element.iter("tie")):
        return [HOLD] * length
    number = 12 * (int(pitch.findtext("octave") or "") + 1) + STEPS[pitch.findtext("step") or ""] + int(pitch.findtext("alter") or 0)
    if not LOWEST <= number <= HIGHEST:
        raise _UnfitError(f"pitch {number} lies outside {LOWEST} .. {HIGHEST}")
    return [FIRST + number - LOWEST, *[HOLD] * (length - 1)]


def read(source: str) -> list[Tensor]:
    """The chorales (S, V) of a score, a folder of scores, or a wheel of music21, by default of the one that is installed.

    Scores that do not fit, such as those with triplets, are left out of a collection. Variants of a melody stand side by side, that
    no split parts them. InputError where there is none.
    """
    pieces, first_error = [], None
    for name, data in _scores(source):
        try:
            pieces.append(score(data, name))
        except InputError as error:
            first_error = first_error or error
    if not pieces:
        raise first_error or InputError(
            f"{source or 'music21'} holds no score: give a .mxl or .musicxml file, a folder of them, or a wheel"
        )
    return [pieces[i] for i in _by_melody(pieces)]


def _scores(source: str) -> Iterator[tuple[str, bytes]]:
    path = Path(source) if source else _installed()
    if path.is_dir():
        for file in sorted(file for kind in ("mxl", "musicxml") for file in path.rglob(f"*.{kind}")):
            yield str(file), file.read_bytes()
    elif path.suffix in (".whl", ".zip") and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = sorted(name for name in archive.namelist() if name.endswith(".mxl"))
                found = [(f"{path}: {name}", archive.read(name)) for name in [n for n in names if "/bach/" in n] or names]
        except DAMAGED as error:
            raise InputError(f"{path} is damaged ({error})") from None
        yield from found
    elif path.is_file():
        yield str(path), path.read_bytes()
    else:
        raise InputError(f"{path} does not exist: give a .mxl or .musicxml file, a folder of them, or a wheel of music21")


def _installed() -> Path:
    found = find_spec("music21")
    if found is None or found.origin is None:
        raise InputError("the chorales come with music21: pip download --no-deps music21, and give --data chorales:FILE with that wheel")
    return Path(found.origin).parent / "corpus" / "bach"


MELODY = 8  # intervals of the soprano by which a melody is known again


def melody(piece_SV: Tensor) -> tuple[int, ...]:
    """The first intervals of the soprano, which variants and transpositions share."""
    pitches = piece_SV[:, 0][piece_SV[:, 0] >= FIRST][: MELODY + 1]
    return tuple(pitches.diff().tolist())


def _by_melody(pieces: Sequence[Tensor]) -> list[int]:
    first: dict[tuple[int, ...], int] = {}
    groups = [first.setdefault(melody(piece), i) for i, piece in enumerate(pieces)]
    return sorted(range(len(pieces)), key=lambda i: (groups[i], i))


PARTS = ("train", "val", "all")


def split(pieces: list[Tensor], part: str, val_fraction: float) -> list[Tensor]:
    """The `train` or `val` part, or `all`: the last melodies validate, each with all its variants."""
    if part not in PARTS:
        raise unknown("split", part, PARTS)
    cut = round(len(pieces) * (1 - val_fraction))
    while 0 < cut < len(pieces) and melody(pieces[cut - 1]) == melody(pieces[cut]):
        cut += 1
    return pieces if part == "all" else pieces[:cut] if part == "train" else pieces[cut:]


@dataclass(frozen=True)
class ChoraleStream(Stream):
    """Pieces of which each draw takes a window that begins on a beat, transposed as far as the range of pitches allows."""

    varies: ClassVar[bool] = True

    @classmethod
    def of(cls, pieces: Sequence[Tensor], window: int, name: str) -> ChoraleStream:
        tokens_N = torch.cat([piece.flatten() for piece in pieces]) if pieces else torch.zeros(0, dtype=torch.long)
        return cls(tokens_N.numpy().astype(np.int32), window, name, tuple(piece.numel() for piece in pieces))

    @cached_property
    def beats(self) -> np.ndarray:
        """Where a window may begin."""
        stride, spans = BEAT * len(VOICES), zip(self._begins(), self.lengths, strict=True)
        return np.concatenate([np.arange(begin, begin + length - self.window + 1, stride) for begin, length in spans])

    def draw(self, batch: int, rng: torch.Generator) -> Tensor:
        """int64 (B, T)."""
        starts_B = self.beats[torch.randint(len(self.beats), (batch,), generator=rng).numpy()]
        rows_BT = self.tokens_N[starts_B[:, None] + np.arange(self.window)]
        return transposed(torch.from_numpy(rows_BT.astype(np.int64)), rng)

    def free(self, x_BT: Tensor, free_BT: Tensor, share: float, rng: torch.Generator) -> Tensor:
        """In this share of the rows voices are given: in half of them the soprano alone, in the others each voice or not."""
        if not share:
            return free_BT
        rows, voices = len(free_BT), len(VOICES)
        given_B1, alone_B1 = torch.rand(rows, 1, generator=rng) < share, torch.rand(rows, 1, generator=rng) < 0.5
        given_BV = torch.where(alone_B1, torch.arange(voices) == 0, torch.rand(rows, voices, generator=rng) < 0.5) & given_B1
        given_BV &= ~given_BV.all(-1, keepdim=True)
        return free_BT & ~given_BV.repeat(1, free_BT.shape[1] // voices)


def transposed(x_BT: Tensor, rng: torch.Generator) -> Tensor:
    """Each row by a uniformly drawn number of half-tones, from -5 to 6, that keeps its pitches in range."""
    sounds_BT = x_BT >= FIRST
    low_B = (FIRST - x_BT.masked_fill(~sounds_BT, FIRST + HIGHEST - LOWEST).amin(-1)).clamp(min=-5)
    high_B = (FIRST + HIGHEST - LOWEST - x_BT.masked_fill(~sounds_BT, FIRST).amax(-1)).clamp(max=6)
    shift_B = low_B + (torch.rand(len(x_BT), generator=rng, dtype=torch.float64) * (high_B - low_B + 1)).long()
    return torch.where(sounds_BT, x_BT + shift_B[:, None], x_BT)


@dataclass(frozen=True)
class Chorales:
    """The chorales of a source as data: positions have a time and a voice, and each time and voice a learned vector."""

    source: str
    unit: ClassVar[str] = "sixteenth"

    @property
    def settings(self) -> Mapping[str, Any]:
        voices = len(VOICES)
        axes = {"axes": (SIXTEENTHS, voices), "groups": ((1, voices), (SIXTEENTHS, 1))}
        return {"window": SIXTEENTHS * voices, "conv": 0, "context": 0} | axes

    def tokenizer(self) -> Tokenizer:
        """A letter for each pitch, - for HOLD and . for REST."""
        return Tokenizer.characters(SYMBOLS)

    @cached_property
    def pieces(self) -> list[Tensor]:
        return read(self.source)

    def stream(self, part: str, window: int, val_fraction: float) -> ChoraleStream:
        return ChoraleStream.of(split(self.pieces, part, val_fraction), window, f"{part} part")


def find(source: str) -> Chorales:
    """`chorales`, `chorales:SOURCE` or a score."""
    name, _, place = source.partition(":")
    return Chorales(place if name == "chorales" else source)


Note = tuple[int, int, int]
"""(first sixteenth, sixteenths, pitch)"""


def notes(voice_S: Sequence[int]) -> list[Note]:
    """The notes of one voice. Nothing sounds where a HOLD has no note before it, nor at other ids, such as the mask."""
    found: list[Note] = []
    for at, token in enumerate(voice_S):
        if FIRST <= token < len(SYMBOLS):
            found.append((at, 1, token - FIRST + LOWEST))
        elif token == HOLD and found and sum(found[-1][:2]) == at:
            found[-1] = (found[-1][0], found[-1][1] + 1, found[-1][2])
    return found


def midi(piece_SV: Tensor) -> bytes:
    """A MIDI file (format 1): the tempo, and a track with a channel for each voice."""
    tempo = b"\x00\xff\x51\x03" + struct.pack(">I", 60_000_000 // BEATS_A_MINUTE)[1:]
    tracks = [tempo, *(_track(channel, voice_S.tolist()) for channel, voice_S in enumerate(piece_SV.T))]
    made = b"MThd" + struct.pack(">IHHH", 6, 1, len(tracks), BEAT * TICKS)
    for track in tracks:
        track += b"\x00\xff\x2f\x00"
        made += b"MTrk" + struct.pack(">I", len(track)) + track
    return made


def _track(channel: int, voice_S: Sequence[int]) -> bytes:
    name = VOICES[channel].encode()
    made, now = b"\x00\xff\x03" + bytes([len(name)]) + name + bytes([0, 0xC0 + channel, CHOIR]), 0
    for begin, length, pitch in notes(voice_S):
        for at, event in ((begin, bytes([0x90 + channel, pitch, 80])), (begin + length, bytes([0x80 + channel, pitch, 0]))):
            made += _length((at - now) * TICKS) + event
            now = at
    return made


def _length(ticks: int) -> bytes:
    """Seven bits a byte, all but the last with the eighth set."""
    made = bytes([ticks & 0x7F])
    while ticks := ticks >> 7:
        made = bytes([0x80 | ticks & 0x7F]) + made
    return made


def write_midi(piece_SV: Tensor, path: str | Path) -> None:
    """Under a temporary name first. InputError where it cannot be written."""
    write_bytes(Path(path), midi(piece_SV))
