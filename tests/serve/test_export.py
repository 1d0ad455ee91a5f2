"""What the page keeps of a run: a trace becomes the run that it tells of, and nothing malformed gets through."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest

from dlm.errors import InputError
from dlm.serve import export as exporting
from dlm.serve.export import export, pane

MASK = 9


def trace(label: str = "") -> dict[str, Any]:
    """`ab` is given, `<c` settles out of masks, first as a draft; the last position stays open."""
    return {
        "label": label,
        "begin": {
            "id": "run-1",
            "model": "tiny",
            "sampler": "ancestral",
            "seed": 1,
            "steps": 3,
            "mask_id": MASK,
            "tokens": [[0, "a"], [1, "b"], [MASK, ""], [MASK, ""], [MASK, ""]],
            "states": "ggnnn",
        },
        "steps": [
            {"step": 1, "forwards": 1, "t": 0.7, "model": "", "seconds": 0.1, "changed": [[3, 2, "c", "f", 0.5, [["c", 0.5], ["d", 0.2]]]]},
            {"step": 2, "forwards": 2, "t": 0.3, "model": "", "seconds": 0.2, "changed": [[2, 4, "x", "d", 0.3, None]]},
            {
                "step": 3,
                "forwards": 4,
                "t": 0.0,
                "model": "",
                "seconds": 0.4,
                "changed": [[2, 3, "<", "f", 0.9, None], [3, 2, "c", "c", None, None]],
            },
        ],
        "end": {"text": "ab<c", "finish_reason": "length", "usage": {"forwards": 4}, "seconds": 0.4},
    }


def test_a_trace_becomes_its_run() -> None:
    label, run = pane(trace("mask"))
    assert label == "mask"
    shown = ["".join(run.piece(token, "█") for token in frame.tokens_BT[0].tolist()) for frame in run.frames()]
    assert shown == ["ab███", "ab█c█", "abxc█", "ab<c█"]
    assert run.settled_BT[0].tolist() == [0, 0, 3, 1, -1]
    assert run.forwards == [0, 1, 2, 4]
    assert run.seconds == [0.0, 0.1, 0.2, 0.4]


def test_draft_tokens_stand_beside_the_text() -> None:
    given = trace()
    given["begin"]["sampler"] = "lookup:4"
    given["steps"] = [
        {"forwards": 1, "changed": [[2, 2, "c", "f", None, None], [3, 5, "y", "d", None, None], [4, 6, "z", "d", None, None]]},
        {"forwards": 2, "changed": [[4, 6, "z", "x", None, None]]},
        {"forwards": 2, "changed": [[3, 5, "y", "f", None, None], [4, 7, "w", "f", None, None]]},
    ]
    _, run = pane(given)
    assert run.text() == "abcyw"
    _, positions, tokens = run.drafts(1)
    assert [(position, run.piece(token)) for position, token in zip(positions.tolist(), tokens.tolist(), strict=True)] == [
        (3, "y"),
        (4, "z"),
    ]
    assert [run.piece(token) for token in run.rejected(2)[2].tolist()] == ["z"]
    assert len(run) == 3
    assert run.forwards == [0, 1, 2]
    assert run.settled_BT[0].tolist() == [0, 0, 1, 2, 2]
    assert (run.drafted_B.tolist(), run.accepted_B.tolist()) == ([2], [1])


def test_a_text_of_parts_of_characters() -> None:
    given = trace()  # one token shows two texts: the part of a character, and the character once it is whole
    given["steps"][2]["changed"] = [[2, 2, "", "f", None, None], [4, 2, "é", "f", None, None]]
    assert pane(given)[1].text() == "abcé"


def test_blends_stand_beside_the_text() -> None:
    given = trace()
    given["steps"][1]["blends"] = [[2, [["x", 0.6], ["<", 0.3]]], [4, [["c", 0.5], ["é", 0.25]]]]
    _, run = pane(given)
    assert [len(run.likely(k, 0)) for k in range(len(run))] == [0, 0, 2, 0]
    told = {i: [(run.piece(token), weight) for token, weight in likely] for i, likely in run.likely(2, 0).items()}
    assert told == {2: [("x", 0.6), ("<", 0.3)], 4: [("c", 0.5), ("é", 0.25)]}


def test_files() -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    page = export({"format": "html", "trace": trace()})
    assert page.name == "run.html"
    assert page.media_type.startswith("text/html")
    text = page.content.decode()
    assert text.startswith("<!doctype html>")
    assert "\\u003c" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    picture = Image.open(BytesIO(export({"format": "gif", "traces": [trace("a"), trace("b")]}).content))
    assert picture.format == "GIF"
    assert getattr(picture, "n_frames", 1) > 3
    kept = json.loads(export({"format": "json", "traces": [trace("a"), trace("b")]}).content)
    assert kept == {"format": "dlm-trace-1", "traces": [trace("a"), trace("b")]}


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    given = copy.deepcopy(trace())
    change(given)
    return {"format": "html", "trace": given}


BAD: dict[str, Any] = {
    "not an object": [1],
    "no format": {"trace": trace()},
    "a format that is a list": {"format": ["html"], "trace": trace()},
    "another format": {"format": "../../etc/passwd", "trace": trace()},
    "no trace": {"format": "html"},
    "no traces": {"format": "html", "traces": []},
    "five traces": {"format": "html", "traces": [trace()] * 5},
    "a trace of another type": {"format": "html", "trace": "run"},
    "no steps": broken(lambda t: t.pop("steps")),
    "no begin": broken(lambda t: t.update(begin=None)),
    "no tokens": broken(lambda t: t["begin"].update(tokens=[], states="")),
    "too few states": broken(lambda t: t["begin"].update(states="gg")),
    "unknown states": broken(lambda t: t["begin"].update(states="ggnnq")),
    "a token that is no pair": broken(lambda t: t["begin"]["tokens"].__setitem__(0, [1])),
    "a token without number": broken(lambda t: t["begin"]["tokens"].__setitem__(0, ["0", "a"])),
    "a token of true": broken(lambda t: t["begin"]["tokens"].__setitem__(0, [True, "a"])),
    "a long text of a token": broken(lambda t: t["begin"]["tokens"].__setitem__(0, [1, "a" * 300])),
    "a label that is a number": broken(lambda t: t.update(label=3)),
    "a step that is null": broken(lambda t: t["steps"].__setitem__(0, None)),
    "a step without changes": broken(lambda t: t["steps"][0].pop("changed")),
    "a short change": broken(lambda t: t["steps"][0].update(changed=[[2, 3]])),
    "a position outside": broken(lambda t: t["steps"][0].update(changed=[[5, 3, "a", "f"]])),
    "a grid of other cells": broken(lambda t: t["begin"].update(grid={"axes": [2, 2], "tile": [1, 1]})),
    "a tile that does not fill it": broken(lambda t: t["begin"].update(grid={"axes": [1, 5], "tile": [1, 2]})),
    "a tile of nothing": broken(lambda t: t["begin"].update(grid={"axes": [1, 5], "tile": [1, 0]})),
    "a grid of no numbers": broken(lambda t: t["begin"].update(grid={"axes": [True, 5.0], "tile": "11"})),
    "a colour that is none": broken(lambda t: t["begin"].update(grid={"axes": [1, 5], "tile": [1, 5], "colours": ["red"]})),
    "a grid that is none": broken(lambda t: t["begin"].update(grid=[1, 5])),
    "a position below 0": broken(lambda t: t["steps"][0].update(changed=[[-1, 3, "a", "f"]])),
    "a given position": broken(lambda t: t["steps"][0].update(changed=[[0, 3, "a", "f"]])),
    "a state that cannot be": broken(lambda t: t["steps"][0].update(changed=[[2, 3, "a", "g"]])),
    "a state that is a number": broken(lambda t: t["steps"][0].update(changed=[[2, 3, "a", 1]])),
    "blends of no pairs": broken(lambda t: t["steps"][0].update(blends=[[3, ["c", 0.5]]])),
    "a blend outside": broken(lambda t: t["steps"][0].update(blends=[[5, [["c", 0.5]]]])),
    "blends of one and of two": broken(lambda t: t["steps"][0].update(blends=[[3, [["c", 0.5]]], [4, [["c", 0.5], ["d", 0.1]]]])),
    "a blend of nothing": broken(lambda t: t["steps"][0].update(blends=[[3, []]])),
    "a share above 1": broken(lambda t: t["steps"][0].update(blends=[[3, [["c", 1.5]]]])),
    "a share that is no number": broken(lambda t: t["steps"][0].update(blends=[[3, [["c", float("nan")]]]])),
    "a blend of numbers": broken(lambda t: t["steps"][0].update(blends=[[3, [[1, 0.5]]]])),
    "forwards below 0": broken(lambda t: t["steps"][0].update(forwards=-1)),
    "seconds that are no number": broken(lambda t: t["steps"][0].update(seconds=float("nan"))),
    "a number that JSON has not": {"format": "json", "trace": trace() | {"end": float("inf")}},
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_bad_traces(body: Any) -> None:
    with pytest.raises(InputError) as told:
        export(body)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 300


@pytest.mark.parametrize("bound", ["MAX_POSITIONS", "MAX_STEPS", "MAX_CHANGES", "MAX_CELLS"])
def test_bounds(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, bound, 2)
    with pytest.raises(InputError, match="too long to export"):
        export({"format": "html", "trace": trace()})


def test_a_run_of_no_steps() -> None:
    given = trace() | {"steps": []}
    assert pane(given)[1].text() == "ab███"
    assert export({"format": "html", "trace": given}).content
