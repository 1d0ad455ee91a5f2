"""Rows of integers in a .npy file: each is one window with the axes of the array, and a damaged file gets one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dlm
from dlm.train import arrays, data_kinds
from dlm.train.config import TrainConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """40 rows of 3 x 4 cells: a name, 0 to 9, in the first line, and the same number below it."""
    names_N = np.arange(40) % 10
    np.save(tmp_path / "rows.npy", np.broadcast_to(names_N[:, None, None], (40, 3, 4)).astype(np.uint8))
    return tmp_path / "rows.npy"


def test_a_window_is_a_row_with_the_axes_of_the_array(path: Path) -> None:
    config = TrainConfig(data=str(path))
    assert (config.network.window, config.network.axes, config.network.groups) == (12, (3, 4), ((1, 4), (3, 1)))
    assert (config.network.conv, config.context) == (0, 0)
    kind = data_kinds.find(str(path))
    assert isinstance(kind, arrays.ArrayRows)
    training, validation = (kind.stream(part, 12, 0.1) for part in ("train", "val"))
    assert len(training.windows()) == 36
    assert validation.windows()[:, 0].tolist() == [6, 7, 8, 9]
    drawn_BT = training.draw(64, torch.Generator().manual_seed(0))
    assert (drawn_BT == drawn_BT[:, :1]).all()  # no window holds two rows
    assert drawn_BT.unique().tolist() == list(range(10))
    assert kind.tokenizer().encode("0129") == [0, 1, 2, 9]


def test_a_row_of_one_axis_is_a_text(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(256).reshape(32, 8))
    config = TrainConfig(data=str(tmp_path / "rows.npy"))
    assert (config.network.window, config.network.axes) == (8, ())
    tokenizer = arrays.find(str(tmp_path / "rows.npy")).tokenizer()
    assert tokenizer.vocab_size == arrays.VALUES
    assert tokenizer.encode(arrays.SYMBOLS) == list(range(arrays.VALUES))
    assert arrays.SYMBOLS.isalnum()  # neither a hole nor a line break


@pytest.mark.slow
def test_a_model_of_rows_fills_what_is_not_given(path: Path, tmp_path: Path) -> None:
    config = TrainConfig(data=str(path), steps=150, warmup=5, batch=16, eval_every=150, ema=0.9)
    fit = dlm.fit(config.with_settings(["layers=2", "heads=2", "width=32"]), tmp_path / "run", progress=lambda *_: None)
    assert fit.val_nats is not None
    assert fit.val_nats < np.log(10)  # a cell
    model = dlm.load(str(tmp_path / "run"))
    canvas = dlm.Canvas.from_rows([[name] + [None] * 11 for name in range(10)], fill=model.tokenizer.mask_id)
    *_, frame = model.sampler(steps=12, temperature=0).steps(canvas, rng=[torch.Generator()] * 10)
    assert (frame.tokens_BT == torch.arange(10)[:, None]).float().mean() > 0.9


def saved(found: Any) -> Any:
    return lambda path: np.save(path, found)


BAD: dict[str, tuple[Any, str]] = {
    "no file": (lambda path: None, "does not exist"),
    "a text": (lambda path: path.write_text("12345"), "no .npy file"),
    "a cut file": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr"), "no .npy file"),
    "an empty file": (lambda path: path.write_bytes(b""), "no .npy file"),
    "objects": (lambda path: np.save(path, np.array([[{}]]), allow_pickle=True), "no .npy file"),
    "fractions": (saved(np.ones((4, 3))), "integers are needed"),
    "one axis": (saved(np.ones(4, dtype=int)), "integers are needed"),
    "no cells": (saved(np.ones((4, 0), dtype=int)), "integers are needed"),
    "a number below 0": (saved(-np.ones((4, 3), dtype=int)), "must lie in 0 .. 255"),
    "a number above 255": (saved(np.full((4, 3), 256)), "must lie in 0 .. 255"),
}


@pytest.mark.parametrize(("write", "told"), BAD.values(), ids=BAD)
def test_other_files_get_one_line(write: Any, told: str, tmp_path: Path) -> None:
    write(tmp_path / "rows.npy")
    with pytest.raises(dlm.InputError, match=told) as error:
        TrainConfig(data=str(tmp_path / "rows.npy"))
    assert "\n" not in str(error.value)
