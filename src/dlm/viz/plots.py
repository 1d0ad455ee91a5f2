"""Curves as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dlm.errors import InputError

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
            band = [0 if math.isnan(b) else b for b in band]
            x, color = range(first, len(mean)), COLORS[i % len(COLORS)]
            axis.plot(x, mean[first:], color=color, lw=1.8, label=run["label"])
            low, high = ([m + sign * b for m, b in zip(mean, band, strict=True)][first:] for sign in (-1, 1))
            axis.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
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


def _save(figure: Any, axes: list[Any], path: Path) -> None:
    from matplotlib import pyplot

    handles, labels = axes[0].get_legend_handles_labels()
    place = ("outside lower center", 2) if len(axes) > 1 else ("outside right upper", 1)
    figure.legend(handles, labels, loc=place[0], ncols=place[1], frameon=False, fontsize=8)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        figure.savefig(partial, dpi=120)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        pyplot.close(figure)
