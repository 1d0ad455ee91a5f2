"""The files of the page: small, self-contained, fit for a strict policy, in the house's colours, which can be read."""

from __future__ import annotations

import re
from pathlib import Path

from dlm.viz import palette

PAGE = Path(__file__).parents[2] / "src" / "dlm" / "serve" / "page"


def test_the_files_need_nothing_else() -> None:
    files = [path for path in PAGE.iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".html", ".css", ".js"}
    for path in files:
        text = path.read_text()
        assert len(text.splitlines()) < 400, path
        assert not re.search(r"https?:|url\(|@import|eval\(|innerHTML|document\.write", text), path
    index = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", index)  # a strict policy forbids them


def test_the_colours_are_those_of_every_other_picture() -> None:
    css = (PAGE / "tokens.css").read_text()
    dark, light = re.findall(r"^:root[^{]*\{([^}]*)\}", css, re.M)[:2]
    for block, theme in ((dark, palette.DARK), (light, palette.LIGHT)):
        found = dict(re.findall(r"--(\w+): (#\w+);", block))
        for name in ("page", "panel", "line", "text", "quiet", "accent", "mask", "given", "draft", "rejected"):
            assert found[name] == getattr(theme, name), name
        assert (found["ink1"], found["glow1"], found["glow2"]) == (*theme.glow[1], theme.glow[3][1])
        for ink in ("text", "quiet", "soft", "given", "draft", "rejected"):  # AA
            assert contrast(found[ink], found["page"]) >= 4.5, ink
            assert contrast(found[ink], found["panel"]) >= 4.5, ink
        assert contrast(found["ink1"], found["glow1"]) >= 4.5
        assert contrast(found["accent"], found["page"]) >= 3
    rules = re.findall(r"\.h(\d+) \{ color: (#\w+); background: (#\w+); \}", css)
    assert [ground for _, _, ground in rules] == list(palette.HEATMAP)
    assert all(contrast(ink, ground) >= 4.5 for _, ink, ground in rules)


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    parts = [channel / 255 for channel in palette.rgb(color)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
