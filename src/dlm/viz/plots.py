"""Curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dlm.errors import InputError
from dlm.files import check_target, replacing

COLORS = ("#2f2c73", "#c26a00", "#2a8c82", "#93458a", "#5f87af", "#7a7f3a", "#b23a48", "#4d4d4d", "#d98cb3", "#000000")
AXES = {
    "settled": "share settled for good",
    "changed": "share changed by the step",
    "error": "differs from the final text",
    "bits": "bits per token under the judge",
}


def check(path: Path) -> None:
    """InputError or ModuleNotFoundError now rather than after the work."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("a plot needs the viz extra: pip install 'dlm[viz]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"a plot is a .png, .svg or .pdf file, not {path.name}")
    check_target(path)


def settling_plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel for each measure, a curve with its 95 % band for each run, against steps. Written to a temporary name first.

    runs: `label`, and for each measure (mean, half-width of the band) at every step.
    """
    check(path)
    names = [name for name in AXES if name in runs[0]]
    figure, axes = _figure(len(names))
    for axis, name in zip(axes, names, strict=True):
        for i, run in enumerate(runs):
            mean, band = run[name]
            first = 1 if name == "changed" else 0
            _band(axis, range(first, len(mean)), mean[first:], band[first:], COLORS[i % len(COLORS)], run["label"], "-")
        axis.set_xlabel("step")
        axis.set_title(AXES[name], fontsize=10, loc="left")
        if name == "changed":
            axis.set_yscale("log")
    _save(figure, axes, path)


def points_plot(series: Mapping[str, Sequence[tuple[float, float, str]]], x: str, y: str, path: Path) -> None:
    """Lines through (x, y, note) points, each noted in small print. Written to a temporary name first."""
    check(path)
    figure, axes = _figure(1)
    for i, (label, points) in enumerate(series.items()):
        axes[0].plot([p[0] for p in points], [p[1] for p in points], "o-", color=COLORS[i % len(COLORS)], ms=3.5, lw=1.2, label=label)
        for px, py, note in points:
            axes[0].annotate(note, (px, py), fontsize=6, xytext=(3, 3), textcoords="offset points", color=COLORS[i % len(COLORS)])
    axes[0].set_xlabel(x)
    axes[0].set_ylabel(y)
    _save(figure, axes, path)


def curse_plot(rows: Sequence[Mapping[str, Any]], levels: Mapping[str, Any], length: int, path: Path) -> None:
    """Bits per character lost against tokens a step, and the cost of a token against the visible share of the text.

    rows: `tokens_per_step`, `equal` and `best` (the curve's price) and `measured` by sampler, each a `mean` with its `band95`.
    levels: `known` tokens, `entropy` and `text` (mean and band95 lists). length: tokens of a text. Written to a temporary name first.
    """
    check(path)
    figure, (cost, height) = _figure(2)
    sizes = [row["tokens_per_step"] for row in rows]
    for i, word in enumerate(dict.fromkeys(word for row in rows for word in row["measured"])):
        there = [(row["tokens_per_step"], row["measured"][word]) for row in rows if word in row["measured"]]
        mean, band = ([pair[name] for _, pair in there] for name in ("mean", "band95"))
        _band(cost, [size for size, _ in there], mean, band, COLORS[i % len(COLORS)], f"{word}, measured", "o-")
    for name, style, label in (("equal", "--", "random, equal steps, by the curve"), ("best", ":", "random, best steps, by the curve")):
        cost.plot(sizes, [row[name]["mean"] for row in rows], style, color="#4d4d4d", lw=1.6, label=label)
    _doubling(cost, sizes)
    cost.set_ylim(bottom=0)
    cost.set_xlabel("tokens drawn at once")
    cost.set_title("bits per character lost", fontsize=10, loc="left")
    shares = [known / length for known in levels["known"]]
    for i, (name, label) in enumerate((("entropy", "h, entropy of the model"), ("text", "h, cross-entropy on the text"))):
        _band(height, shares, levels[name]["mean"], levels[name]["band95"], COLORS[2 + i], label, "-")
    height.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    height.set_ylim(bottom=0)
    height.set_xlabel("share of the text that is visible")
    height.set_title("bits per character that a masked token costs", fontsize=10, loc="left")
    _save(figure, [cost, height], path)


def _band(axis: Any, x: Sequence[float], mean: Sequence[float], band: Sequence[float], color: str, label: str, style: str) -> None:
    """A line in its band; none where the band is nan."""
    axis.plot(x, mean, style, color=color, lw=1.8, ms=4, label=label)
    half = [0 if math.isnan(b) else b for b in band]
    low, high = ([m + sign * b for m, b in zip(mean, half, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=color, alpha=0.18, lw=0)


def _doubling(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis from the least to the greatest, with a tick at each power of two."""
    first, last = (round(math.log2(value)) for value in (min(values), max(values)))
    axis.set_xscale("log", base=2)
    axis.set_xticks([2**k for k in range(first, last + 1)], [str(2**k) for k in range(first, last + 1)])
    axis.minorticks_off()


Line = Sequence[tuple[float, float, float]]
"""Points x, y, half-width of the band."""


def panels_plot(panels: Sequence[tuple[str, str, Mapping[str, Line]]], path: Path, *, doubling: bool = True) -> None:
    """A panel for each (title, name of x, lines by label); a label keeps its colour. doubling: x in powers of two. Written to a
    temporary name first."""
    check(path)
    figure, axes = _figure(len(panels))
    labels = list(dict.fromkeys(label for *_, lines in panels for label in lines))
    for axis, (title, x, lines) in zip(axes, panels, strict=True):
        for label, line in lines.items():
            color = COLORS[labels.index(label) % len(COLORS)]
            _band(axis, [p[0] for p in line], [p[1] for p in line], [p[2] for p in line], color, label, "o-")
        if doubling:
            _doubling(axis, [point[0] for line in lines.values() for point in line])
        axis.set_xlabel(x)
        axis.set_title(title, fontsize=10, loc="left")
    _save(figure, axes, path)


def weights_plot(weights: Mapping[str, float], what: str, path: Path) -> None:
    """A bar for each weight of a noise process, from 1 on a logarithmic axis: what stands higher is written earlier. Written to a
    temporary name first."""
    check(path)
    figure, axes = _figure(1)
    axis, values = axes[0], list(weights.values())
    colors = [COLORS[0] if value >= 1 else COLORS[1] for value in values]
    axis.bar(range(len(values)), [value - 1 for value in values], bottom=1, color=colors, width=0.8)
    axis.set_yscale("log")
    every = 1 if what == "token" else max(1, len(values) // 16)
    axis.set_xticks(range(0, len(values), every), list(weights)[::every], fontsize=8 if every > 1 or len(values) < 40 else 6)
    axis.set_xlabel(f"{what}{', the first to be written at the left' if what == 'token' else ' in the window'}")
    axis.set_ylabel("weight: high is written early, low late")
    _save(figure, axes, path)


MARKERS = "osD^v"


def fronts_plot(tables: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Bits against forward passes and against seconds, a row of panels for each table, the points of each front joined.

    points: `group` (a colour and a marker), `note`, `calls`, `seconds`, `bits`, `band95`, `fair` (dull text is pale) and `front`.
    Written to a temporary name first.
    """
    check(path)
    figure, axes = _figure(2 * len(tables))
    groups = list(dict.fromkeys(point["group"] for points in tables.values() for point in points))
    for axis, (name, cost) in zip(axes, ((n, c) for n in tables for c in ("calls", "seconds")), strict=True):
        points = tables[name]
        for point in points:
            place = groups.index(point["group"])
            color, marker = COLORS[place % len(COLORS)], MARKERS[place // len(COLORS) % len(MARKERS)]
            alpha = 1.0 if point["fair"] else 0.3
            where = point[cost], point["bits"]
            axis.errorbar(*where, yerr=point["band95"], fmt=marker, color=color, ms=5, lw=0.8, alpha=alpha, label=point["group"])
            axis.annotate(point["note"], where, fontsize=6, xytext=(4, 3), textcoords="offset points", color=color, alpha=alpha)
        best: list[tuple[float, float]] = []
        for where in sorted((point[cost], point["bits"]) for point in points if point["front"]):
            if not best or where[1] < best[-1][1]:
                best.append(where)
        axis.plot(*zip(*best, strict=True), color="#4d4d4d", lw=1.0, ls=":", zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_xlabel({"calls": "forward passes for a window", "seconds": "seconds for a window"}[cost])
        axis.set_title(f"{name}: bits per character under the judge", fontsize=10, loc="left")
    _save(figure, axes, path, columns=4)


def _figure(count: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, count)
    rows = -(-count // columns)
    size = (5.4 * columns, 3.6 * rows) if count > 1 else (9.5, 5.2)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _save(figure: Any, axes: list[Any], path: Path, columns: int = 2) -> None:
    from matplotlib import pyplot

    named = dict(pair[::-1] for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True))  # each label once
    labels, handles = list(named), list(named.values())
    place = ("outside lower center", columns) if len(axes) > 1 else ("outside right upper", 1)
    figure.legend(handles, labels, loc=place[0], ncols=place[1], frameon=False, fontsize=8)
    try:
        with replacing(path) as partial:
            figure.savefig(partial, dpi=120, format=path.suffix.removeprefix("."))
    finally:
        pyplot.close(figure)
