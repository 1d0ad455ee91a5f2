"""A blend of tokens is drawn as strong as it is likely: one character in a terminal, all of them over one another elsewhere."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dlm.trajectory import Canvas, Frame, Likely, Trajectory
from dlm.viz import layout, palette
from dlm.viz.gif import write_gif
from dlm.viz.html import write_html
from dlm.viz.palette import DARK, SHADES, rgb
from dlm.viz.terminal import Panes
from serve.visitor import CHROMIUM, blends, browses

ALPHABET = "xbcd\n|_"
Weights = list[tuple[str, float]]
DOUBTFUL: Weights = [("b", 0.5), ("c", 1 / 3), ("d", 0.05)]
"""The last is too weak for a shade of a GIF."""


def run(*frames: list[Weights]) -> Trajectory:
    """The given `x`, then positions that show these blends in each frame, and in the last frame one `b` each."""
    length = 1 + len(frames[0])
    x_BT = torch.zeros(1, length, dtype=torch.long)
    x_BT[0, 1:] = ALPHABET.index("b")
    free_BT = torch.arange(length)[None] > 0
    made = Trajectory(torch.where(free_BT, 9, x_BT), Canvas(x_BT, free_BT, x_BT >= 0), pieces=dict(enumerate(ALPHABET)), mask_id=9)
    for k, places in enumerate(frames, 1):
        token_EC = torch.tensor([[ALPHABET.index(char) for char, _ in one] for one in places])
        weight_EC = torch.tensor([[weight for _, weight in one] for one in places])
        z_BT = torch.cat([x_BT[:, :1], token_EC[None, :, 0]], 1)
        likely = Likely(torch.zeros(len(places), dtype=torch.long), 1 + torch.arange(len(places)), token_EC, weight_EC)
        made.append(Frame(z_BT, ~free_BT, torch.tensor([0.5]), "", k, likely=likely), seconds=float(k))
    made.append(Frame(x_BT, free_BT | True, torch.zeros(1), "", len(frames) + 1), seconds=len(frames) + 1.0)
    return made


def until(made: Trajectory, frames: int) -> Trajectory:
    """The same run as it stood then."""
    grown = layout.empty(made)
    for k, frame in list(enumerate(made.frames()))[1 : frames + 1]:
        grown.append(frame, seconds=made.seconds[k])
    return grown


def test_a_look_has_every_token_that_weighs_something() -> None:
    made = run([DOUBTFUL, [("\n", 0.04), ("c", 0.04), ("d", 0.03)]])
    given, *looks = layout.looks(until(made, 1), 0)
    assert given == palette.GIVEN
    assert [look.blend for look in looks] == [(("b", 3), ("c", 2)), (("↵", 0),)]  # the likeliest stands in any case
    assert not any(look.blend for look in layout.looks(made, 0))


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_shows_the_likeliest_out_of_the_noise_into_its_colour(no_color: bool) -> None:
    shares = [0.0, 1 / 3, 2 / 3, 1.0]
    made = run(*([[("c", share), ("d", (1 - share) / 2), ("b", (1 - share) / 2)]] for share in shares))
    found = []
    for k in range(1, 5):
        console = Console(file=io.StringIO(), width=40, height=9, force_terminal=True, color_system="truecolor", no_color=no_color)
        console.print(Panes([("", until(made, k))]))
        assert isinstance(console.file, io.StringIO)
        line = console.file.getvalue().splitlines()[0]
        code = re.search(r"\x1b\[([0-9;]*)mc\x1b", line)
        assert code is not None
        assert re.sub(r"\x1b\[[0-9;]*m", "", line) == "xc"  # no runner-up beside it
        found.append(code[1])
    dim = ["2;3", "2;3", "3", "3"]
    if no_color:
        assert found == dim
        return
    low, high = rgb(palette.TERMINAL_MASK), rgb(palette.TERMINAL_SURE)
    for drawn_code, begin, share in zip(found, dim, shares, strict=True):
        assert drawn_code.startswith(begin + ";38;2;")
        drawn = [int(channel) for channel in drawn_code.split(";")[-3:]]
        assert drawn == pytest.approx([a + (b - a) * share for a, b in zip(low, high, strict=True)], abs=0.5)


def inked(likely: Weights, path: Path) -> torch.Tensor:
    """How much of the colour of a draft, from 0 to 1, each pixel of the GIF has where the blend stands."""
    from PIL import Image

    write_gif([("", run([likely]))], path)
    with Image.open(path) as picture:
        picture.seek(1)
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
    width, height = 18, 45  # of a cell; one row and two columns of margin, then the given token
    at = slice(height, 2 * height), slice(3 * width, 4 * width)
    low, high = (torch.tensor(rgb(color), dtype=torch.float64) for color in (DARK.page, DARK.draft))
    share = (pixels[at].double() - low) / (high - low)
    assert (share - share[..., :1]).abs().max() < 0.02  # on the way from one colour to the other
    return share.mean(-1)


def test_a_gif_draws_the_runner_up_behind_the_likeliest_each_as_strong_as_it_is_likely(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    pytest.importorskip("matplotlib")
    first, second = (inked([(char, 1.0), ("d", 0.0)], tmp_path / "one.gif") for char in "|_")
    both = inked([("|", 0.5), ("_", 1 / 3), ("d", 0.05)], tmp_path / "both.gif")
    only_first, only_second, neither = first > 0.99, (second > 0.99) & (first < 0.01), (first < 0.01) & (second < 0.01)
    assert min(int(part.sum()) for part in (only_first, only_second, neither)) > 20
    assert (both[only_first] - 0.5).abs().max() < 0.02
    assert (both[only_second] - 1 / 3).abs().max() < 0.02
    assert both[neither].abs().max() < 0.02
    assert (both - torch.maximum(first / 2, second / 3)).abs().max() < 1 / SHADES  # edges have shades of their own


@pytest.mark.browser
@browses
def test_a_replay_draws_all_of_them_each_as_strong_as_it_is_likely(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    sharper: Weights = [("c", 0.7), ("\n", 0.2), ("b", 0.1)]
    frames = [[DOUBTFUL, sharper], [sharper, [("d", 0.9), ("b", 0.06), ("c", 0.04)]]]
    write_html([("", run(*frames))], tmp_path / "run.html")
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(reduced_motion="reduce")
        page.on("pageerror", lambda error: complaints.append(str(error)))
        for k, wanted in enumerate(frames, 1):
            page.goto("about:blank")
            page.goto((tmp_path / "run.html").as_uri() + f"#at={k / 3 + 0.01}")
            page.wait_for_selector(".text .line")
            drawn: list[Any] = blends(page.locator(".text .l"))
            assert [[text for text, _ in one] for one in drawn] == [[char.replace("\n", "↵") for char, _ in one] for one in wanted]
            for one, known in zip(drawn, wanted, strict=True):
                assert [alpha for _, alpha in one] == pytest.approx([weight for _, weight in known], abs=0.006)
        page.locator(".text .l").first.hover()
        assert "70 % “c”\n20 % “↵”\n10 % “b”" in str(page.text_content("#tip"))
        page.goto("about:blank")
        page.goto((tmp_path / "run.html").as_uri() + "#at=1")
        page.wait_for_selector(".text .line")
        assert page.locator(".text .l").count() == 0
        assert page.locator(".text").text_content() == "xbb"
        browser.close()
    assert complaints == []
