"""Chorales: scores become tokens and tokens MIDI, draws are transposed and begin on a beat, and the kind is one file and one entry."""

from __future__ import annotations

import inspect
import json
import runpy
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import scores
from conftest import Dlm
from dlm.errors import InputError
from dlm.language_model import load
from dlm.sampling.draw import generators
from dlm.text.tokenizer import Tokenizer
from dlm.train import chorales, data_kinds, recipes
from dlm.train.chorales import FIRST, HOLD, LOWEST, REST, Chorales, ChoraleStream
from dlm.train.data import Stream
from dlm.trajectory import Canvas

SRC = Path(__file__).parents[2] / "src" / "dlm"
TOY = ["--set", "steps=2", "--set", "layers=1", "--set", "width=16", "--set", "heads=2", "--set", "batch=2", "--set", "eval_windows=2"]
QUARTER = "<note><rest/><duration>4</duration></note>"


def token(pitch: int) -> int:
    return FIRST + pitch - LOWEST


@pytest.mark.parametrize("name", ["one.mxl", "one.musicxml"])
def test_a_score_becomes_tokens(tmp_path: Path, name: str) -> None:
    tied = scores.note("C#5", 1, '<tie type="start"/>') + scores.note("C#5", 1, '<tie type="stop"/>')
    soprano = scores.note("B4", 3, "<grace/>") + tied + scores.note("", 1) + scores.note("A4", 1)
    alto, tenor, bass = (scores.note(pitch, 4) for pitch in ("Bb3", "C2", "A5"))
    path = scores.write(tmp_path / name, scores.document([soprano, alto, tenor, bass]))
    (piece_SV,) = chorales.read(str(path))
    assert piece_SV.T.tolist() == [
        [token(73), HOLD, REST, token(69)],
        [token(58), HOLD, HOLD, HOLD],
        [token(36), HOLD, HOLD, HOLD],
        [token(81), HOLD, HOLD, HOLD],
    ]
    assert Chorales("").tokenizer().decode(piece_SV.flatten().tolist())[:5] == "lWAt-"


def test_the_four_voices_are_found_among_instruments_and_divisions_are_read(tmp_path: Path) -> None:
    parts = [scores.note(pitch, 1) for pitch in ("C6", "C5", "C4", "D4", "C3", "C2")]
    names = ("Horn 1", "Soprano\rOboe", "Alto", "Tenor", "Bass", "Continuo")
    path = scores.write(tmp_path / "seven.mxl", scores.document(parts, names, divisions=1))
    (piece_SV,) = chorales.read(str(path))
    assert piece_SV.shape == (4, 4)
    assert piece_SV[0].tolist() == [token(pitch) for pitch in (72, 60, 62, 48)]


BAD = {
    "grid": (scores.note("C5", "1.5") * 2, "a note of 3/8 quarters does not fit on a grid of sixteenths"),
    "chord": (scores.note("C5", 4) + scores.note("E5", 4, "<chord/>"), "a voice has several notes at once"),
    "backup": (scores.note("C5", 4) + "<backup><duration>4</duration></backup>", "a voice has several notes at once"),
    "range": (scores.note("C6", 4), "pitch 84 lies outside 36 .. 81"),
    "length": (scores.note("C5", 8), "its voices are 8, 4, 4, 4 sixteenths long, and not equally long"),
    "number": (scores.note("C5", "long"), "a note whose pitch or duration cannot be read"),
    "step": (scores.note("H5", 4), "a note whose pitch or duration cannot be read"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_score_that_does_not_fit_is_refused_in_a_line(tmp_path: Path, fault: str) -> None:
    part, message = BAD[fault]
    path = scores.write(tmp_path / "bad.mxl", scores.document([part, QUARTER, QUARTER, QUARTER]))
    with pytest.raises(InputError) as raised:
        chorales.read(str(path))
    assert str(raised.value) == f"{path}: {message}"


def test_files_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    for name, data in {"a.mxl": b"PK\x03\x04 cut off", "b.mxl": b"text", "c.musicxml": b'<?xml version="1.0" encoding="odd"?><a/>'}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="is no score in MusicXML"):
            chorales.read(str(tmp_path / name))
    path = scores.write(tmp_path / "three.mxl", scores.document([QUARTER] * 3))
    with pytest.raises(InputError, match="has 3 parts: four are needed"):
        chorales.read(str(path))
    with pytest.raises(InputError, match="does not exist: give a"):
        chorales.read(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no score"):
        chorales.read(str(tmp_path / "empty"))


def test_a_wheel_is_read_as_a_folder_is_and_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    folder = scores.collection(tmp_path / "scores", 3)
    scores.write(folder / "odd.mxl", scores.document([QUARTER] * 3))
    with zipfile.ZipFile(tmp_path / "music.whl", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"music/corpus/bach/{file.name}")
        archive.write(folder / "bwv000.mxl", "music/corpus/other/more.mxl")
    found = [chorales.read(str(tmp_path / name)) for name in ("scores", "music.whl")]
    assert [len(pieces) for pieces in found] == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_split_parts_the_variants_of_a_melody() -> None:
    melodies = [torch.randint(FIRST, 40, (12, 4), generator=torch.Generator().manual_seed(i)) for i in range(10)]
    pieces = [*melodies, melodies[0] + 2, melodies[8] + 3]  # the same melodies, transposed
    pieces = [pieces[i] for i in chorales._by_melody(pieces)]
    assert [len({chorales.melody(piece) for piece in pieces[i : i + 2]}) for i in (0, 9)] == [1, 1]
    for share in (0.1, 0.2, 0.3):
        train, val = (chorales.split(pieces, part, share) for part in ("train", "val"))
        assert len(train) + len(val) == len(pieces)
        assert not {chorales.melody(piece) for piece in train} & {chorales.melody(piece) for piece in val}
    with pytest.raises(InputError, match="unknown split 'odd'"):
        chorales.split(pieces, "odd", 0.1)


def test_draws_begin_on_beats_and_are_transposed_within_the_range() -> None:
    piece_SV = torch.arange(12)[:, None] * 4 + torch.arange(4)  # a token tells its place
    piece_SV = piece_SV.clamp(max=FIRST + 25)
    piece_SV[piece_SV < FIRST] = HOLD
    piece_SV[4:] = torch.tensor([token(60), token(50), HOLD, REST])
    stream = ChoraleStream.of([piece_SV], 16, "part")
    drawn = stream.draw(3000, torch.Generator().manual_seed(0))
    assert set(stream.beats.tolist()) == {0, 16, 32}
    later = drawn[drawn[:, 3] == REST]
    assert torch.equal(later[:, 0] - later[:, 1], torch.full_like(later[:, 0], 10))
    counts = torch.bincount(later[:, 0] - token(60) + 5)
    assert len(counts) == 12
    assert ((counts - len(later) / 12).abs() < 5 * (len(later) / 12) ** 0.5).all()
    assert torch.equal(later[:, 2:4].unique(dim=0), torch.tensor([[HOLD, REST]]))
    edge = chorales.transposed(torch.tensor([[token(36), token(81)], [token(36), token(36)]]).repeat(500, 1), torch.Generator())
    assert set(edge[::2].flatten().tolist()) == {token(36), token(81)}
    assert set(edge[1::2, 0].tolist()) == {token(pitch) for pitch in range(36, 43)}


def test_voices_are_given_in_a_share_of_the_rows() -> None:
    stream = ChoraleStream.of([torch.zeros(64, 4, dtype=torch.long)], 256, "part")
    x_BT, free_BT = torch.zeros(4000, 256, dtype=torch.long), torch.ones(4000, 256, dtype=torch.bool)
    assert stream.free(x_BT, free_BT, 0.0, torch.Generator()) is free_BT
    free_BSV = stream.free(x_BT, free_BT, 0.5, torch.Generator().manual_seed(0)).view(4000, 64, 4)
    assert torch.equal(free_BSV, free_BSV[:, :1].expand_as(free_BSV))  # voices as a whole
    assert free_BSV.any(-1).all()
    kinds, counts = free_BSV[:, 0].unique(dim=0, return_counts=True)
    share = {tuple(kind): count / 4000 for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True)}
    assert len(share) == 15
    assert share[False, True, True, True] == pytest.approx(0.5 * (0.5 + 0.5 / 16), abs=0.03)
    assert share[True, True, True, True] == pytest.approx(0.5 + 0.5 * 0.5 * 2 / 16, abs=0.03)


def read_midi(data: bytes) -> tuple[int, list[list[tuple[int, int, int]]]]:
    """(ticks of a quarter, the notes of each track with a channel as (begin, ticks, pitch)), by the standard alone."""
    kind, size, form, tracks, division = struct.unpack(">4sIHHH", data[:14])
    assert (kind, size, form) == (b"MThd", 6, 1)
    at, found = 14, []
    for _ in range(tracks):
        assert data[at : at + 4] == b"MTrk"
        end = at + 8 + struct.unpack(">I", data[at + 4 : at + 8])[0]
        at, now, sounding, made = at + 8, 0, {}, []
        while at < end:
            delta = 0
            while True:
                at += 1
                delta = delta << 7 | data[at - 1] & 0x7F
                if data[at - 1] < 0x80:
                    break
            now += delta
            status = data[at]
            if status == 0xFF:
                last = data[at + 1] == 0x2F
                at += 3 + data[at + 2]
                assert last == (at == end)
            elif status >> 4 == 0xC:
                at += 2
            else:
                pitch = data[at + 1]
                if status >> 4 == 9:
                    sounding[pitch] = now
                else:
                    begin = sounding.pop(pitch)
                    made.append((begin, now - begin, pitch))
                at += 3
        assert not sounding
        found.append(made)
    assert at == len(data)
    return division, found[1:]


def test_midi_holds_the_notes(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    piece_SV = torch.where(torch.rand(200, 4, generator=rng) < 0.7, HOLD, torch.randint(1, 48, (200, 4), generator=rng))
    piece_SV[0, 1] = HOLD  # before any note: silence
    piece_SV[:, 3] = torch.tensor([token(40)] + [HOLD] * 199)  # 24,000 ticks, in three bytes
    piece_SV[5, 2] = 48  # a mask
    chorales.write_midi(piece_SV, tmp_path / "a.mid")
    division, tracks = read_midi((tmp_path / "a.mid").read_bytes())
    assert division == 4 * 120
    wanted = [[(120 * at, 120 * length, pitch) for at, length, pitch in chorales.notes(voice)] for voice in piece_SV.T.tolist()]
    assert tracks == wanted
    assert tracks[3] == [(0, 24_000, 40)]
    sounds_S4 = torch.zeros(200, 4, dtype=torch.bool)
    for voice, made in enumerate(tracks):
        for begin, ticks, pitch in made:
            sounds_S4[begin // 120 : (begin + ticks) // 120, voice] = True
            assert piece_SV[begin // 120, voice] == token(pitch)
            assert (piece_SV[begin // 120 + 1 : (begin + ticks) // 120, voice] == HOLD).all()
    assert not sounds_S4[(piece_SV == REST) | (piece_SV == 48)].any()
    assert sounds_S4[piece_SV >= FIRST].sum() == ((piece_SV >= FIRST) & (piece_SV < 48)).sum()


def test_midi_that_cannot_be_written_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="there is no directory"):
        chorales.write_midi(torch.zeros(1, 4, dtype=torch.long), tmp_path / "no" / "a.mid")
    script = SRC.parents[1] / "examples" / "harmonise.py"
    monkeypatch.setattr("sys.argv", ["harmonise.py", "scores", "none/made.mid"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script))
    assert capsys.readouterr() == ("", "harmonise.py: there is no directory none to write into: make it first\n")


def test_a_new_kind_of_data_is_one_file_and_one_entry() -> None:
    """Beside its recipe, nothing else in the library knows of chorales."""
    naming = {str(path.relative_to(SRC)) for path in SRC.rglob("*.py") if "chorale" in path.read_text(encoding="utf-8").lower()}
    assert naming == {"train/chorales.py", "train/data_kinds.py", "train/recipes.py"}
    entries = [line for line in (SRC / "train/data_kinds.py").read_text().splitlines() if "Entry(_chorales" in line]
    assert len(entries) == 1


@dataclass(frozen=True)
class Dice:
    """Rolls of three dice, sorted: a kind as docs/own_data.md has it."""

    unit: ClassVar[str] = "die"
    settings: ClassVar[Mapping[str, Any]] = {"window": 3, "conv": 0, "context": 0}

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.characters("123456")

    def stream(self, part: str, window: int, val_fraction: float) -> Stream:
        rolls = np.sort(np.random.default_rng(part == "val").integers(0, 6, (100, 3)))
        return Stream(rolls.flatten().astype(np.int32), window, part, (3,) * 100)


def test_the_page_about_own_data_shows_this_kind() -> None:
    page = SRC.parents[1] / "docs" / "own_data.md"
    assert f"```python\n{inspect.getsource(Dice)}```" in page.read_text(encoding="utf-8")


def test_a_kind_of_ones_own(dlm: Dlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data_kinds.KINDS, "dice", data_kinds.Entry(lambda source: Dice(), "dice", words=("dice",)))
    code, _, err = dlm("train", "--data", "dice", "--out", "run", *TOY)
    assert code == 0, err
    code, out, err = dlm("eval", "run", "--data", "dice", "--json")
    assert code == 0, err
    assert json.loads(out)["unit"] == "die"


def test_a_model_of_chorales_trains_is_measured_and_harmonises(dlm: Dlm, tmp_path: Path) -> None:
    folder = scores.collection(tmp_path / "scores")
    assert recipes.of_data(f"chorales:{folder}") == recipes.find("chorales")
    code, out, err = dlm("train", "--data", f"chorales:{folder}", "--out", "run", "--json", *TOY)
    assert code == 0, err
    network = json.loads(Path("run/config.json").read_text())["network"]
    assert (network["axes"], network["groups"], network["window"]) == ([64, 4], [[1, 4], [64, 1]], 256)
    code, out, err = dlm("eval", "run", "--data", f"chorales:{folder}", "--passes", "2")
    assert code == 0, err
    assert "bits per sixteenth" in " ".join(out.split())
    model = load("run")
    piece_SV = chorales.split(chorales.read(str(folder)), "val", 0.1)[0]
    row = [token if at % 4 == 0 else None for at, token in enumerate(piece_SV.flatten().tolist())]
    canvas = Canvas.from_rows([row], fill=model.tokenizer.mask_id)
    *_, frame = model.sampler(sampler="topk", steps=4).steps(canvas, rng=generators(0, 1))
    made_SV = frame.tokens_BT.view(-1, 4)
    assert torch.equal(made_SV[:, 0], piece_SV[:, 0])
    assert (made_SV < len(chorales.SYMBOLS)).all()


def test_without_scores_the_command_says_where_they_are(dlm: Dlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlm.train.chorales.find_spec", lambda name: None)
    code, _, err = dlm("train", "chorales", *TOY)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "pip download --no-deps music21" in err
