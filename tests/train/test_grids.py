"""Grids in training: draws are valid grids, given cells are not predicted, and a run ends in a checkpoint that solves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Dlm
from dlm.errors import InputError
from dlm.grids.sudoku import Sudoku
from dlm.models.config import TransformerConfig
from dlm.train import recipes
from dlm.train.config import TrainConfig
from dlm.train.grids import GridStream
from dlm.train.setup import resolve

TOY = ["--set", "steps=2", "--set", "layers=1", "--set", "width=16", "--set", "heads=2", "--set", "batch=4", "--set", "eval_windows=4"]


def test_the_shape_of_the_network_is_that_of_the_grid() -> None:
    config = TrainConfig(data="sudoku:6", network=TransformerConfig(vocab_size=1, heads=2, width=32, conv=5), context=64)
    network = config.network
    assert (network.window, network.axes, network.groups, network.conv) == (36, (6, 6), ((1, 6), (6, 1), (2, 3)), 0)
    assert config.context == 0
    with pytest.raises(InputError, match="not divided among 2 axes"):
        TrainConfig(data="sudoku:4", network=TransformerConfig(vocab_size=1, heads=2, width=20))


def test_draws_are_valid_grids_and_tokens_their_symbols() -> None:
    kind = Sudoku(4)
    stream, rng = GridStream.of(kind, "train"), torch.Generator().manual_seed(0)
    drawn = stream.draw(64, rng)
    assert all(not kind.conflicts(cells) for cells in drawn.tolist())
    assert len(stream.windows()) == 288
    setup = resolve(replace(recipes.find("sudoku-4"), batch=4))
    assert [setup.tokenizer.piece(token) for token in range(4)] == list("1234")
    assert setup.validation_WT.shape == (288, 16)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 16, 16), (0.5, 5, 14), (1.0, 2, 10)])
def test_in_a_share_of_the_rows_a_puzzle_is_given(share: float, low: float, high: float) -> None:
    stream, rng = GridStream.of(Sudoku(4), "train"), torch.Generator().manual_seed(0)
    free = stream.free(stream.draw(400, rng), torch.ones(400, 16, dtype=torch.bool), share, rng).sum(-1).float()
    assert bool((free > 0).all())
    assert low <= float(free.mean()) <= high


@pytest.mark.slow
def test_a_toy_run_of_sudoku_9_ends_in_a_model_that_draws_grids(dlm: Dlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlm.grids.sudoku.CORPUS", {"train": 4, "val": 4})
    code, out, err = dlm("train", "sudoku-9", "--out", "run", "--json", *TOY)
    assert code == 0, err
    assert json.loads(out)["step"] == 2
    assert json.loads(Path("run/config.json").read_text())["network"]["groups"] == [[1, 9], [9, 1], [3, 3]]
    given = "12345678945678912378912345623456789156789123489123456734567891267891234591234567"
    code, out, _ = dlm("solve", given + ".", "run", "--json", "--tries", "20", "--sampler", "ancestral", "--temperature", "1")
    found = json.loads(out)
    assert found["solved"] is (code == 0)
    assert found["solved"] is (found["answer"] == given + "8")
    code, out, _ = dlm("eval", "run", "--data", "sudoku:9", "--max-windows", "4", "--json")
    assert code == 0
    assert json.loads(out)["is_bound"] is True


def test_data_that_is_a_kind_of_grid_takes_its_recipe(dlm: Dlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlm.train.training.MANY_EPOCHS", 0)
    code, _, err = dlm("train", "--data", "sudoku:4", "--out", "run", *TOY)
    assert code == 0, err
    assert "done; try: dlm solve PUZZLE --model run --watch" in err
    assert "warning" not in err  # for few grids, which come under many symmetries
    assert json.loads(Path("run/config.json").read_text())["training"]["weights"] == recipes.find("sudoku-4").weights


@pytest.mark.parametrize("recipe", ["sudoku-4", "sudoku-9", "maze-9"])
def test_a_recipe_is_found_by_its_data(recipe: str) -> None:
    assert recipes.of_data(recipe.replace("-", ":")) == recipes.find(recipe)


def test_text_models_and_grids_do_not_mix(dlm: Dlm, masked_dir: Path) -> None:
    assert "does not know the cells of sudoku:4" in dlm.told("eval", str(masked_dir), "--data", "sudoku:4")
    assert "no diffusion model of grids" in dlm.told("solve", "1" + "." * 15, str(masked_dir))
    assert "known: sudoku:4, sudoku:6, sudoku:9" in dlm.told("train", "--data", "sudoku:5")
