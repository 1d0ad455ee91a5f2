"""The look of a character, given its state: the one source for terminal styles, CSS and GIF colours.

A character that has just changed glows and cools to its settled colour. Masks are deep indigo and given text is quiet. Text that the
sampler may still change is slanted, so that it can be told from settled text without colour. A draft token is dim and slanted, a
rejected one is struck through.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from rich.style import Style

RGB = tuple[int, int, int]

COLD = 8
"""Levels of heat: 0 has just changed, COLD glows no more."""

LEVEL_SECONDS = 0.05
"""A level lasts one frame or this long, whichever is longer, so that the glow of a quick run can be seen."""


SHADES = 6
"""Levels of the weight of a character in a blend: SHADES is sure."""


class Look(NamedTuple):
    """How one character is drawn. kind: mask, given, text, drafted, rejected or border; level: 0 (hot) .. COLD; draft: not promised yet.

    blend: several characters at one place, each with the level of its weight, the likeliest first; empty for a single one.
    colour: of the cell itself, #rrggbb, in grids of colours.
    """

    kind: str
    level: int = COLD
    draft: bool = False
    blend: tuple[tuple[str, int], ...] = ()
    colour: str = ""


MASK, GIVEN, DRAFTED, REJECTED = Look("mask"), Look("given"), Look("drafted", draft=True), Look("rejected")
BORDER = Look("border")  # between the boxes of a grid


def level(frames: float, seconds: float) -> int:
    """Heat of a character that changed `frames` frames and `seconds` seconds ago."""
    return max(0, min(COLD, int(min(frames, seconds / LEVEL_SECONDS + 1e-6))))


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb. glow: (ink, ground) of the levels 0 .. COLD - 1."""

    page: str
    panel: str
    line: str
    text: str
    quiet: str
    accent: str
    mask: str
    given: str
    draft: str
    rejected: str
    glow: tuple[tuple[str, str], ...]


DARK = Theme(
    page="#0e1016",
    panel="#14171f",
    line="#272b38",
    text="#d9dce3",
    quiet="#838a9c",
    accent="#f2a93b",
    mask="#2d2b63",
    given="#7390b5",
    draft="#a294dc",
    rejected="#e0686d",
    glow=(
        ("#221503", "#fff3d1"),
        ("#221503", "#ffd680"),
        ("#221503", "#f6ae45"),
        ("#ffdca6", "#7c4a14"),
        ("#ffd29a", "#543416"),
        ("#f7cb9b", "#372619"),
        ("#efcda8", "#231c19"),
        ("#e5d5c1", "#181718"),
    ),
)

LIGHT = Theme(
    page="#fbfaf7",
    panel="#ffffff",
    line="#e2dfd6",
    text="#23262e",
    quiet="#6a7080",
    accent="#c26a00",
    mask="#c7c4ee",
    given="#44698f",
    draft="#6a57b8",
    rejected="#bf3840",
    glow=(
        ("#3b1d00", "#ffab1f"),
        ("#3b1d00", "#ffbe4d"),
        ("#3b1d00", "#ffcd75"),
        ("#402404", "#ffd996"),
        ("#3f290d", "#ffe4b4"),
        ("#392a17", "#ffedcd"),
        ("#322920", "#fff3e0"),
        ("#2a2828", "#fdf8ee"),
    ),
)

# A terminal does not tell its background: these read on black and on white. The hot levels bring their own ground.
TERMINAL_MASK, TERMINAL_GIVEN, TERMINAL_DRAFT = "#6a63cf", "#5f87af", "#8a78c8"
TERMINAL_HOT = (("#221503", "#ffe6a8"), ("#221503", "#ffcb66"), ("#221503", "#f6ae45"))
TERMINAL_GLOW = ("#d58a1c", "#c3842f", "#b07f42", "#9f7a58", "#8f7868")
TERMINAL_REJECTED, TERMINAL_SURE = "#c9565c", "#a58be8"
QUIET, ACCENT = Style(dim=True), Style(color="#c98a1c")

HEATMAP = (
    *("#2f2c73", "#47327f", "#5f3788", "#793d8c", "#93458a", "#ac4f82"),
    *("#c25c74", "#d46d62", "#e28250", "#ec9b47", "#f3b754", "#f7d37e"),
)
"""Background of a character by when it last changed: early to late."""


@cache
def terminal(look: Look, color: bool = True) -> Style:
    """The rich style; without colour, freshness is bold and underline and a mask is dim."""
    if look.colour and color:
        return Style(color=ink_on(look.colour), bgcolor=look.colour, bold=look.level < COLD or None)
    if look.kind == "border":
        return QUIET
    if look.kind == "drafted":
        return Style(dim=True, italic=True)
    if look.kind == "rejected":
        return Style(color=TERMINAL_REJECTED, strike=True) if color else Style(strike=True)
    if look.kind != "text":
        return Style(color=TERMINAL_MASK if look.kind == "mask" else TERMINAL_GIVEN) if color else QUIET
    if look.blend:  # one character a cell: the likeliest, out of the noise into its colour
        share = look.blend[0][1] / SHADES
        return (
            Style(color=mixed(TERMINAL_MASK, TERMINAL_SURE, share), dim=share < 0.5 or None, italic=True)
            if color
            else Style(dim=share < 0.5 or None, italic=True)
        )
    if not color:
        return Style(bold=look.level < 6 or None, underline=look.level < 3 or None, italic=look.draft or None)
    if look.level == COLD:
        return Style(color=TERMINAL_DRAFT, italic=True) if look.draft else Style.null()
    if look.level < len(TERMINAL_HOT):
        ink, ground = TERMINAL_HOT[look.level]
        return Style(color=ink, bgcolor=ground, bold=True, italic=look.draft or None)
    return Style(color=TERMINAL_GLOW[look.level - len(TERMINAL_HOT)], bold=look.level < 5 or None, italic=look.draft or None)


def paint(look: Look, theme: Theme = DARK) -> tuple[RGB, RGB]:
    """(ink, ground) for a picture."""
    if look.colour:
        return rgb(ink_on(look.colour)), rgb(look.colour)
    if look.kind == "mask":
        return rgb(theme.mask), rgb(theme.mask)
    if look.kind == "given":
        return rgb(theme.given), rgb(theme.page)
    if look.kind == "border":
        return rgb(theme.quiet), rgb(theme.page)
    if look.kind in ("drafted", "rejected"):
        return rgb(theme.quiet if look.kind == "drafted" else theme.rejected), rgb(theme.page)
    if look.level < COLD:
        ink, ground = theme.glow[look.level]
        return rgb(ink), rgb(ground)
    return rgb(theme.draft if look.draft else theme.text), rgb(theme.page)


def mixed(low: str, high: str, share: float) -> str:
    """The colour at that share of the way from one to the other."""
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(rgb(low), rgb(high), strict=True))


def rgb(color: str) -> RGB:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def css() -> str:
    """Custom properties of both themes; classes m (mask), g (given), d (draft), p (draft token), x (rejected), b (border),
    f0 .. f7 (glow), h0 .. h11 (heat map)."""
    rules = [
        f":root{{color-scheme:dark light;{_properties(DARK)}}}",
        f"@media (prefers-color-scheme:light){{:root{{{_properties(LIGHT)}}}}}",
        ".m{background:var(--mask)}.g{color:var(--given)}.d{color:var(--draft);font-style:italic}",
        ".p{color:var(--quiet);font-style:italic}.x{color:var(--rejected);text-decoration:line-through}.b{color:var(--quiet)}",
    ]
    rules += [f".f{i}{{color:var(--ink{i});background:var(--glow{i})}}" for i in range(COLD)]
    for i, ground in enumerate(HEATMAP):
        rules.append(f".h{i}{{color:{ink_on(ground)};background:{ground}}}")
    return "\n".join(rules)


def _properties(theme: Theme) -> str:
    names = ("page", "panel", "line", "text", "quiet", "accent", "mask", "given", "draft", "rejected")
    pairs = [f"--{name}:{getattr(theme, name)}" for name in names]
    pairs += [f"--ink{i}:{ink};--glow{i}:{ground}" for i, (ink, ground) in enumerate(theme.glow)]
    return ";".join(pairs)


def ink_on(ground: str) -> str:
    """The colour of a text that reads well there."""
    return "#1d1006" if _luminance(ground) > 0.2 else "#f6f2ff"


def _luminance(color: str) -> float:
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
