"""The live view: exact text afterwards, nothing where it may not draw, never wider or higher than the terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from dlm.viz import layout
from dlm.viz.palette import COLD, level
from dlm.viz.terminal import LiveView, Panes, replay
from runs import TEXT, drafting, run

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def terminal(width: int = 80, height: int = 24, **options: Any) -> Console:
    options = {"force_terminal": True, "color_system": "truecolor", "no_color": False, **options}
    return Console(file=io.StringIO(), width=width, height=height, **options)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(panes: Panes, console: Console) -> list[str]:
    console.print(panes)
    return ESCAPES.sub("", output(console)).splitlines()


@pytest.mark.parametrize("no_color", [False, True])
def test_leaves_the_exact_text(no_color: bool) -> None:
    whole, console = run(), terminal(no_color=no_color)
    grown = layout.empty(whole)
    with LiveView(grown, console, label="name", total_steps=10) as view:
        for frame in list(whole.frames())[1:]:
            grown.append(frame, seconds=1.0)
            view.update()
    shown = ESCAPES.sub("", output(console)).replace("\r", "")
    assert shown.endswith(f"{TEXT}\nname: 10 steps, 10 passes, {len(TEXT) - 5} tokens in 1.00 s, 110 tok/s, 11.0 tok/pass\n")
    assert output(console).count("\x1b[?25l") == output(console).count("\x1b[?25h") == 1


def test_no_color_means_no_colour_codes() -> None:
    console = terminal(no_color=True)
    replay([("", run(revise=True))], console, seconds=0.1)
    codes = {part for code in re.findall(r"\x1b\[([0-9;]*)m", output(console)) for part in code.split(";")}
    assert {"1", "2", "3", "4"} <= codes <= {"0", "1", "2", "3", "4"}


def test_draws_nothing_where_there_is_no_terminal() -> None:
    console = terminal(force_terminal=False)
    with LiveView(run(), console) as view:
        view.update(force=True)
    replay([("", run())], console, seconds=1.0)
    assert output(console) == ""


@pytest.mark.parametrize("until", [1, 5, 10])
@pytest.mark.parametrize("panes", [1, 2, 3, 9])
@pytest.mark.parametrize("width", [80, 40, 7])
def test_stays_inside_the_terminal(panes: int, width: int, until: int) -> None:
    made = run(TEXT * 8, until=until)
    lines = drawn(Panes([("a 名 label " * 9, made)] * panes, total_steps=10), terminal(width))
    assert len(lines) < 24
    assert max(cell_len(line) for line in lines) <= width


def test_only_a_line_break_breaks_a_line() -> None:
    lines = drawn(Panes([("", run("ab\ncd", given=0, steps=5, until=1))]), terminal())
    assert len(lines) == 2
    assert len(lines[0]) == 5
    lines = drawn(Panes([("", run("ab\ncd", given=0))]), terminal())
    assert lines[:2] == ["ab", "cd"]


def test_wide_and_dangerous_characters() -> None:
    made = run("日本" * 30 + "\x1b[31m\t\x7f\x9b\u2028", given=0)
    lines = drawn(Panes([("", made)]), terminal(41))
    assert lines[0] == "日本" * 10
    assert "␛[31m    \ufffd\ufffd\ufffd" in "".join(lines)


def test_a_tall_text_shows_where_work_is_done() -> None:
    tall = "".join(f"{i:02}\n" for i in range(90))
    made = run(tall, given=len(tall) - 6, steps=2, until=1)
    lines = drawn(Panes([("", made)]), terminal())
    assert "87" in lines
    assert "00" not in lines
    assert layout.follow(0, [], 10, 90) == 0
    assert layout.follow(30, [35], 10, 90) == 30
    assert layout.follow(30, [80], 10, 90) == 75
    assert layout.follow(30, [89], 10, 90) == 80


def test_the_last_frame_is_drawn_in_spite_of_the_throttle() -> None:
    console, whole = terminal(), run()
    grown = layout.empty(whole)
    with LiveView(grown, console) as view:
        for frame in list(whole.frames())[1:]:
            grown.append(frame, seconds=1.0)
            view.update()
        assert "step 10 " not in output(console)
        view.update(force=True)
        assert "step 10 " in output(console)


def test_an_interrupt_passes_and_restores_the_cursor() -> None:
    console = terminal()
    with pytest.raises(KeyboardInterrupt), LiveView(run(until=4), console):
        raise KeyboardInterrupt
    assert output(console).count("\x1b[?25l") == output(console).count("\x1b[?25h") == 1
    assert "stopped after 4 steps" in output(console)


def test_heat_falls_by_frames_and_by_seconds() -> None:
    assert level(0, 9.0) == level(9, 0.0) == 0
    assert level(3, 9.0) == level(9, 0.15) == 3
    assert level(99, 99.0) == COLD
    made = run(given=0)
    looks = layout.looks(made, 0)
    assert {look.level for look in looks} >= {0, 1, 5}
    assert all(look.level == COLD for look in layout.looks(made, 0, after=1.0))


def test_several_runs_one_after_another_in_the_scrollback() -> None:
    console = terminal()
    replay([("one", run()), ("two", run(steps=3))], console, seconds=0.1)
    end = ESCAPES.sub("", output(console)).replace("\r", "").split("one\n")[-1]
    assert end.startswith(TEXT + "\n10 steps")
    assert f"\n\ntwo\n{TEXT}\n3 steps" in end


@pytest.mark.parametrize("no_color", [False, True])
def test_draft_tokens_are_dim_and_rejected_ones_are_struck(no_color: bool) -> None:
    """In front of what replaced it; after the end there is neither."""
    shown = {}
    for until in (2, 3, 4, 5):
        console = terminal(no_color=no_color)
        console.print(Panes([("", drafting(until))]))
        parts = re.findall(r"\x1b\[([0-9;]*)m([^\x1b]*)", output(console))
        struck = "".join(text for code, text in parts if code.startswith("9"))
        dim = "".join(text for code, text in parts if code == "2;3")
        shown[until] = (ESCAPES.sub("", output(console)).splitlines()[0], struck, dim)
    assert shown == {
        2: ("O: Hear my↵░░░░", "", "my↵"),
        3: ("O: Hear my↵e no░░", "y↵", " no"),
        4: ("O: Hear me now░", "", ""),
        5: ("O: Hear me now.", "", ""),
    }


def test_the_line_below_tells_tokens_a_pass_and_acceptance() -> None:
    lines = drawn(Panes([("", drafting(3))]), terminal())
    assert "2.3 tok/pass  3 passes  67% accepted  23 tok/s" in lines[-1]
    console = terminal(width=120)
    replay([("", drafting())], console, seconds=0.1)
    end = ESCAPES.sub("", output(console)).replace("\r", "")
    assert end.endswith("O: Hear me now.\n5 steps, 5 passes, 12 tokens in 0.50 s, 2.4 tok/pass, 78% of 9 draft tokens accepted, 24 tok/s\n")


@pytest.mark.parametrize(
    ("width", "labels"), [(40, "one, 2 more below at the end"), (60, "one two, 1 more below at the end"), (90, "one two three")]
)
def test_a_narrow_terminal_says_that_runs_are_left_out(width: int, labels: str) -> None:
    head, *_ = drawn(Panes([(name, run()) for name in ("one", "two", "three")]), terminal(width=width))
    assert " ".join(head.split()) == labels


def test_a_combining_mark_takes_the_cell_of_its_letter() -> None:
    assert layout.glyphs("e\u0301x\n") == (("\u00e9", 1), ("x", 1), ("\n", 0))
    assert layout.glyphs("q\u0301") == (("q\u0301", 1),)
    [line] = layout.wrap(["ab", "e\u0301", "x"], 4)
    assert [glyph.char for glyph in line] == ["a", "b", "\u00e9", "x"]
