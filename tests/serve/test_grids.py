"""A model of grids on the server: a puzzle is a canvas, its run says that it is a grid, and what is kept of it is drawn as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import dlm
from conftest import make_model
from dlm.grids import arc
from dlm.grids.grid import written
from dlm.grids.sudoku import Sudoku
from dlm.serve.export import pane
from dlm.train.arc import TaskStream, find

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
PUZZLE = "1...2..1.14....."


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    from serve.serving import serving

    with serving([dlm.load("sudoku-4")]) as made:
        yield made


def test_a_puzzle_is_solved_and_its_run_is_a_grid(served: Any) -> None:
    (model,) = served.client.get("/v1/models").json()["data"]
    assert model["dlm"]["grid"] == {"axes": [4, 4], "tile": [2, 2], "symbols": "1234"}
    canvas = [None if cell == "." else cell for cell in PUZZLE]
    (_, begin), *steps, (last, end) = served.native({"canvas": canvas, "sampler": "margin", "temperature": 0, "seed": 1})
    assert begin["grid"] == {"axes": [4, 4], "tile": [2, 2]}
    assert begin["states"] == "".join("n" if cell == "." else "g" for cell in PUZZLE)
    kind = Sudoku(4)
    assert (last, end["text"]) == ("end", written(kind, next(kind.completions([None if c == "." else int(c) - 1 for c in PUZZLE]))))
    trace = {"begin": begin, "steps": [step for _, step in steps]}
    page = served.post("/v1/dlm/export", {"format": "html", "trace": trace})
    assert '"cells":[0,-1,1,-1,2' in page.text


def test_cells_of_an_arc_task_keep_their_colours_on_the_way_to_a_picture() -> None:
    """A picture numbers the texts anew, in the order in which they come."""
    from serve.serving import serving

    data = find("arc-rules:2")
    shape = {name: data.settings[name] for name in ("axes", "groups", "window")}
    lm = make_model(context=0, alphabet=arc.SYMBOLS, colours=TaskStream.colours, **shape)
    task = data.tasks("val")[0]
    cells = [arc.SYMBOLS[cell] for cell in arc.canvas(task.demonstrations, *task.tests[0], size=2, pairs=3).flatten()]
    with serving([lm]) as made:
        assert made.client.get("/v1/models").json()["data"][0]["dlm"]["grid"]["colours"] == [*arc.PALETTE, ""]
        (_, begin), *steps, _ = made.native({"canvas": [*cells[:-2], None, None], "steps": 2})
    _, run = pane({"begin": begin, "steps": [step for _, step in steps]})
    assert run.meta["grid"]["axes"] == [6, 4]
    found = [run.meta["grid"]["colours"][number] for number in run.current_BT[0].tolist()]
    shown = [run.piece(number) for number in run.current_BT[0].tolist()]
    assert shown[:-2] == cells[:-2]
    assert found == ["" if piece == arc.SYMBOLS[-1] else arc.PALETTE[int(piece)] for piece in shown]
