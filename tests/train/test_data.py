"""What may be read, how it is split, and which windows come out."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlm import bundled
from dlm.errors import InputError
from dlm.formats import native
from dlm.text.tokenizer import Tokenizer
from dlm.train import data, recipes
from dlm.train.data import Stream
from train import tiny


def fails(match: str) -> Any:
    return pytest.raises(InputError, match=match)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwö\n".encode())
    assert data.read(str(tmp_path / "a.txt")) == ["one\ntwö\n"]


def test_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("deep/c.txt", "third"), ("d.md", "not read")):
        (tmp_path / name).write_text(text)
    assert data.read(str(tmp_path)) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"no data at .*missing\.txt: give a text file"),
        ("empty.txt", b"", r"empty\.txt is empty"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 text \(byte 3\): iconv -f WINDOWS-1252"),
        ("wide.txt", b"\xff\xfec\0a\0", r"iconv -f UTF-16"),
        ("paper.pdf", b"%PDF-1.4\n%\xe2\xe3", r"it is a PDF, of which pdftotext takes the text"),
        ("letter.docx", b"PK\x03\x04\x14\0\xff", r"an archive or an office document"),
        ("picture.txt", b"\x89PNG\0\xff", r"not UTF-8 text \(byte 0\)$"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with fails(message) as error:
        data.read(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_the_bundled_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name means this text everywhere; a local file of the name is reached by its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare").write_text("my own")
    (found,) = data.read("shakespeare")
    assert hashlib.md5(found.encode()).hexdigest() == "6fb458f1232090904fb40fe944165e91"
    assert data.read("./shakespeare") == ["my own"]


def test_a_misspelt_data_set() -> None:
    with fails(r"no data at shakespear: did you mean the bundled data set shakespeare\?"):
        data.read("shakespear")


def test_recipes_and_bundled_models_read_data_that_are_there() -> None:
    sources = {native.load_config(path).training["data"] for path in bundled.models().values()} - {"kjv.txt", "tuberculosis.fa"}
    sources |= {recipe().data for name, recipe in recipes.RECIPES.items() if name.startswith("shakespeare")}
    assert sources == {"shakespeare", "sudoku:4", "sudoku:9", "maze:9", "arc-rules:3"}


def test_no_source_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "note.txt").write_text("not asked for")
    monkeypatch.chdir(tmp_path)
    with fails("no data"):
        data.read("")


def test_a_folder_without_text(tmp_path: Path) -> None:
    with fails(r"holds no \.txt file"):
        data.read(str(tmp_path))


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local data set of two splits, cached below tmp_path."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "stories"
    folder.mkdir()
    rows = [{"text": "once"}, {"text": None}, {"text": "twice"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    return folder


def test_a_data_set(dataset: Path) -> None:
    assert data.read(f"hf:{dataset}") == ["once", "twice"]
    assert data.read(f"hf:{dataset}:text:validation") == data.read(f"hf:{dataset}::validation") == ["held out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (":story", "no column 'story'; it has text"),
        (":text:test", "could not be loaded"),
        (":text:train:more", "does not name a data set"),
    ],
)
def test_a_data_set_asked_for_wrongly(dataset: Path, words: str, message: str) -> None:
    with fails(message) as error:
        data.read(f"hf:{dataset}{words}")
    assert "\n" not in str(error.value)


def test_a_data_set_that_is_not_there(dataset: Path) -> None:
    with fails("could not be loaded"):
        data.read(f"hf:{dataset}/nowhere")
    with fails("does not name a data set"):
        data.read("hf:")


def test_data_sets_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with fails(r"pip install 'dlm\[data\]'"):
        data.read("hf:anything")


def test_one_text_is_split_by_characters_and_many_by_documents() -> None:
    assert data.split(["abcdefghij"], 0.2) == (["abcdefgh"], ["ij"])
    assert data.split(["abc", "def"], 0.5) == (["abc"], ["\ndef"])
    many = [str(n) for n in range(200)]
    assert data.split(many, 0.1) == (many[:180], many[180:])


def test_parts_by_name() -> None:
    assert [data.select(["abcdefghij"], part, 0.2) for part in ("train", "val", "all")] == [["abcdefgh"], ["ij"], ["abcdefghij"]]
    with fails("unknown split 'test'"):
        data.select(["abc"], "test", 0.1)


def test_documents_are_parted_by_a_newline() -> None:
    stream = Stream.encode(["ab", "ba"], Tokenizer.characters("ab\n"), 2)
    assert stream.tokens_N.tolist() == [1, 2, 0, 2, 1]


def stream(length: int = 100, window: int = 8) -> Stream:
    return Stream(torch.arange(length, dtype=torch.int32).numpy(), window)


def test_windows_cover_the_stream_once() -> None:
    windows_WT = stream().windows()
    assert windows_WT.shape == (12, 8)
    assert windows_WT.dtype == torch.int64
    assert windows_WT.flatten().tolist() == list(range(96))


def test_draws_are_windows_reproducible_and_reach_both_ends() -> None:
    rows_BT = stream().draw(2000, torch.Generator().manual_seed(3))
    assert torch.equal(rows_BT, stream().draw(2000, torch.Generator().manual_seed(3)))
    assert not torch.equal(rows_BT, stream().draw(2000, torch.Generator().manual_seed(4)))
    assert torch.equal(rows_BT, rows_BT[:, :1] + torch.arange(8))
    assert rows_BT.unique().tolist() == list(range(100))


def test_a_stream_of_one_window() -> None:
    assert stream(8).draw(3, torch.Generator().manual_seed(0)).tolist() == [list(range(8))] * 3
    with fails("the data has 7 tokens, less than one window of 8"):
        stream(7)


def test_no_window_holds_two_pieces_and_each_place_is_as_likely() -> None:
    parted = Stream(torch.arange(20, dtype=torch.int32).numpy(), 4, pieces=(9, 3, 8))  # 6 places, none, 5
    counts = torch.bincount(parted.draw(11_000, torch.Generator().manual_seed(0))[:, 0], minlength=20)
    assert (counts > 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16]
    assert ((counts[counts > 0] - 1000).abs() < 150).all()  # 5 standard errors
    assert parted.windows()[:, 0].tolist() == [0, 4, 12, 16]
    with fails("5 tokens in its longest piece, less than one window of 6"):
        Stream(np.arange(9, dtype=np.int32), 6, pieces=(5, 4))


def test_fingerprint_follows_the_tokens() -> None:
    assert stream(50).fingerprint() == stream(50, window=4).fingerprint() != stream(51).fingerprint()


@pytest.mark.parametrize(
    ("size", "message"), [(30, "training part has"), (200, "validation part has"), (400, "validation part fills one window")]
)
def test_too_little_text_to_train(tmp_path: Path, size: int, message: str) -> None:
    with fails(message):
        tiny.run(tiny.write_text(tmp_path / "text.txt", size), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_part_of_the_windows_is_spread_over_the_text() -> None:
    stream = Stream(np.arange(100, dtype=np.int32), 10)
    assert stream.windows(4)[:, 0].tolist() == [0, 30, 60, 90]
    assert torch.equal(stream.windows(50), stream.windows())
