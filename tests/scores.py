"""Small scores in MusicXML, made by hand."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

NAMES = ("Soprano", "Alto", "Tenor", "Bass")
CONTAINER = '<container><rootfiles><rootfile full-path="made.xml"/></rootfiles></container>'
MAJOR = ("C", "D", "E", "F", "G", "A", "B")


def note(pitch: str, duration: int | str, more: str = "") -> str:
    """pitch: as C5, C#4 or Bb3; empty for a rest."""
    if not pitch:
        return f"<note><rest/><duration>{duration}</duration></note>"
    alter = {"#": "<alter>1</alter>", "b": "<alter>-1</alter>"}.get(pitch[1:-1], "")
    spelt = f"<pitch><step>{pitch[0]}</step>{alter}<octave>{pitch[-1]}</octave></pitch>"
    return f"<note>{more if 'grace' in more or 'chord' in more else ''}{spelt}<duration>{duration}</duration>{more}</note>"


def document(parts: Sequence[str], names: Sequence[str] = NAMES, divisions: int = 4) -> str:
    """parts: the inside of the first measure of each."""
    listed = "".join(f'<score-part id="P{i}"><part-name>{name}</part-name></score-part>' for i, name in enumerate(names))
    begin = f"<attributes><divisions>{divisions}</divisions></attributes>"
    written = "".join(f'<part id="P{i}"><measure number="1">{begin}{part}</measure></part>' for i, part in enumerate(parts))
    return f'<?xml version="1.0" encoding="UTF-8"?><score-partwise><part-list>{listed}</part-list>{written}</score-partwise>'


def write(path: Path, text: str) -> Path:
    """Compressed where the name ends in .mxl."""
    if path.suffix == ".mxl":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("META-INF/container.xml", CONTAINER)
            archive.writestr("made.xml", text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


def tune(number: int, beats: int = 16) -> str:
    """One of many chorales: quarters that climb in a way of their own, below one another by thirds."""
    steps = [(number * (beat % 5 + 1) + beat * beat) % 7 for beat in range(beats)]
    octave = {"Soprano": 5, "Alto": 4, "Tenor": 4, "Bass": 3}
    return document(
        ["".join(note(f"{MAJOR[(step + 2 * voice) % 6]}{octave[name]}", 4) for step in steps) for voice, name in enumerate(NAMES)]
    )


def collection(folder: Path, count: int = 20) -> Path:
    """A folder of so many of them."""
    folder.mkdir()
    for number in range(count):
        write(folder / f"bwv{number:03}.mxl", tune(number))
    return folder
