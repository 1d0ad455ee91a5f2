"""The GIF: as many pictures as steps, exact colours, masks at the start and none at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dlm.viz.gif import write_gif
from dlm.viz.palette import COLD, DARK, LIGHT, Look, paint, rgb
from runs import drafting, run

SMALL: dict[str, Any] = {"size": 12, "columns": 40}
COOLING = 8  # pictures of the end at 20 a second


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    found = image.convert("RGB").getcolors(maxcolors=1 << 20)
    assert found is not None
    return {colour for _, colour in found}  # type: ignore[misc]


def frames(image: Image.Image) -> int:
    count = getattr(image, "n_frames", 1)
    assert isinstance(count, int)
    return count


def test_one_picture_a_step(tmp_path: Path) -> None:
    write_gif([("label", run())], tmp_path / "run.gif", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["run.gif"]
    with Image.open(tmp_path / "run.gif") as image:
        assert frames(image) == 11 + COOLING
        assert image.info["loop"] == 0
        first, glowing, durations = colours(image), set(), []
        for k in range(frames(image)):
            image.seek(k)
            durations.append(image.info["duration"])
            glowing |= colours(image)
        last = colours(image)
    assert rgb(DARK.mask) in first
    assert rgb(DARK.mask) not in last
    assert {rgb(DARK.page), rgb(DARK.text), rgb(DARK.given), rgb(DARK.accent)} <= last
    assert {paint(Look("text", k))[1] for k in range(COLD)} <= glowing
    assert not {paint(Look("text", k))[1] for k in range(COLD)} & last
    assert len(glowing) < 128
    assert durations[0] == 400
    assert durations[-1] == 1550
    assert 4000 < sum(durations) < 7000


@pytest.mark.parametrize(("steps", "most", "pictures"), [(90, 30, 30), (5, 200, 6 + COOLING), (40, 200, 41 + COOLING)])
def test_long_runs_skip_steps(tmp_path: Path, steps: int, most: int, pictures: int) -> None:
    write_gif([("", run(steps=steps))], tmp_path / "run.gif", max_frames=most, **SMALL)
    with Image.open(tmp_path / "run.gif") as image:
        assert frames(image) == pictures


def test_panes_side_by_side_and_a_tall_text(tmp_path: Path) -> None:
    write_gif([("one", run())], tmp_path / "one.gif", **SMALL)
    write_gif([("one", run()), ("two", run(steps=3, revise=True))], tmp_path / "two.gif", theme=LIGHT, **SMALL)
    write_gif([("tall", run("line\n" * 100, steps=4))], tmp_path / "tall.gif", rows=5, **SMALL)
    with Image.open(tmp_path / "one.gif") as one, Image.open(tmp_path / "two.gif") as two:
        assert two.width > 1.8 * one.width
        assert two.height == one.height
        assert rgb(LIGHT.page) in colours(two)
    with Image.open(tmp_path / "tall.gif") as tall:
        assert tall.height < 200


def test_wide_characters_keep_their_cells(tmp_path: Path) -> None:
    write_gif([("", run("日本ab\n" * 3, given=0, steps=3))], tmp_path / "run.gif", rows=2, **SMALL)
    with Image.open(tmp_path / "run.gif") as image:
        image.seek(frames(image) - 1)
        assert rgb(DARK.mask) not in colours(image)


def test_the_verification_of_draft_tokens_has_a_picture(tmp_path: Path) -> None:
    """The draft tokens, then the rejected ones among them; without draft tokens the two pictures are one."""
    write_gif([("", drafting())], tmp_path / "run.gif", **SMALL)
    red = []
    with Image.open(tmp_path / "run.gif") as image:
        assert frames(image) == 9 + COOLING
        for k in range(frames(image)):
            image.seek(k)
            red.append(rgb(DARK.rejected) in colours(image))
    assert [k for k, struck in enumerate(red) if struck] == [4]  # between calls 2 and 3


def test_without_the_extra_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the viz extra: pip install 'dlm\[viz\]'"):
        write_gif([("", run())], tmp_path / "run.gif")


def test_a_combining_mark_stands_on_its_letter(tmp_path: Path) -> None:
    """Whether it is a token of its own or not: the end looks as the composed character does."""
    ends = []
    for text in ("cafe\u0301 au lait", "caf\u00e9 au lait"):
        write_gif([("", run(text, given=text.index(" "), steps=3))], tmp_path / "run.gif", **SMALL)
        with Image.open(tmp_path / "run.gif") as image:
            image.seek(frames(image) - 1)
            ends.append(image.convert("RGB").tobytes())
    assert ends[0] == ends[1]
