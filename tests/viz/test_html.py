"""The page: self-contained, safe whatever the text is, and its events lead to the final text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dlm.trajectory import Canvas, Frame, Trajectory
from dlm.viz.html import write_html
from runs import DRAFTS, TEXT, drafting, run

NASTY = ["</script><script>alert(1)</script>", "<b>b</b>", "&amp;", "\n", "\u2028", "{{data}}", "/*palette*/", "\ud800", "日本"]


class Page(HTMLParser):
    """Tags with their attributes, and the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data, self.title, self._inside = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "data" if ("id", "data") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif self._inside == "title":
            self.title += data


def words(pieces: list[str]) -> Trajectory:
    x_BT = torch.arange(len(pieces))[None]
    free_BT = x_BT > 0
    z_BT = torch.where(free_BT, len(pieces), x_BT)
    made = Trajectory(z_BT, Canvas(x_BT, free_BT, x_BT >= 0), pieces=dict(enumerate(pieces)), mask_id=len(pieces))
    made.append(Frame(x_BT, x_BT >= 0, torch.zeros(1), "", 1), seconds=1.0)
    return made


def replayed(pane: dict[str, Any], frames: int | None = None) -> str:
    tokens = list(pane["start"])
    for event in pane["events"][:frames]:
        for position, piece in zip(event[::2], event[1::2], strict=True):
            tokens[position] = piece
    return "".join(pane["pieces"][token] for token in tokens)


def test_events_lead_to_the_final_text(tmp_path: Path) -> None:
    runs = [("masked", run()), ("revised", run(revise=True, steps=7))]
    write_html(runs, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    panes = json.loads(Page((tmp_path / "page.html").read_text(encoding="utf-8")).data)
    for pane, (label, made) in zip(panes, runs, strict=True):
        assert pane["label"] == label
        assert replayed(pane) == TEXT
        for k, frame in enumerate(made.frames()):
            assert replayed(pane, k) == "".join(made.piece(token) for token in frame.tokens_BT[0].tolist())
        assert pane["settled"] == made.settled_BT[0].tolist()
        assert pane["forwards"] == made.forwards
        assert len(pane["seconds"]) == len(pane["events"]) + 1
        assert pane["free"] == [0] * 5 + [1] * (len(TEXT) - 5)


def test_a_row_of_a_padded_batch(tmp_path: Path) -> None:
    canvas = Canvas.from_rows([[0, None, None], [1, None]], fill=0)
    start_BT = torch.where(canvas.free_BT, 2, canvas.tokens_BT)
    made = Trajectory(start_BT, canvas, pieces={0: "a", 1: "b"}, mask_id=2)
    made.append(Frame(torch.tensor([[0, 0, 0], [1, 1, 1]]), canvas.valid_BT, torch.zeros(2), "", 1))
    for row, text in enumerate(["aaa", "bb"]):
        write_html([("", made)], tmp_path / "page.html", row=row)
        assert replayed(json.loads(Page((tmp_path / "page.html").read_text()).data)[0]) == text


@pytest.mark.parametrize("label", ["plain", "<i>label</i> {{data}}"])
def test_model_text_stays_text(tmp_path: Path, label: str) -> None:
    write_html([("plain", words(["a", "b"]))], tmp_path / "plain.html")
    write_html([(label, words(NASTY))], tmp_path / "nasty.html")
    plain, nasty = (Page((tmp_path / f"{name}.html").read_text(encoding="utf-8")) for name in ("plain", "nasty"))
    assert [tag for tag, _ in nasty.tags] == [tag for tag, _ in plain.tags]
    assert nasty.title == label
    assert "<" not in nasty.data
    assert replayed(json.loads(nasty.data)[0]) == "".join(NASTY).replace("\ud800", "\ufffd")


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    write_html([("", run())], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|\bimport\b|fetch\(|XMLHttp|innerHTML", text)
    for _, attributes in Page(text).tags:
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
    assert "default-src 'none'" in text
    assert "prefers-color-scheme" in text
    assert "prefers-reduced-motion" in text
    assert len(text) < 40_000


def test_the_legend_has_every_look(tmp_path: Path) -> None:
    """Each state stands in the legend in the class that draws it, and each class has a rule."""
    write_html([("", run())], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    legend = re.search(r'id="states">(.*?)</div>', text, re.S)
    assert legend is not None
    looks = dict(re.findall(r'<span class="(\w+)">(\w+)</span>', legend[1]))
    assert set(looks) == {"m", "d", "f0", "g"}
    for look in [*looks, "p", "x"]:
        assert re.search(rf"\.{look}[ ,{{]", text.partition("</style>")[0]), look


def test_draft_tokens_of_each_frame(tmp_path: Path) -> None:
    write_html([("", drafting()), ("", run())], tmp_path / "page.html")
    ours, plain = json.loads(Page((tmp_path / "page.html").read_text()).data)
    assert plain["drafts"] == []
    known = 3
    assert ours["drafts"][0] == []
    for flat, (new, draft) in zip(ours["drafts"][1:], DRAFTS, strict=True):
        known += len(new)
        assert flat[::2] == list(range(known, known + len(draft)))
        assert "".join(ours["pieces"][piece] for piece in flat[1::2]) == draft
