"""Model schedules judged without a judge: a Markov source whose exact posterior is known, and every schedule's law written out.

    python benchmarks/markov.py                     # 8 positions, 3 tokens: all 256 schedules, half a minute

H knows the exact posterior; L sees what is visible within `--reach` positions. One token a call in random order, so that the law of a
schedule, its KL from the source and the bound by the path are exact. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
from operator import itemgetter
from typing import Any, TypedDict

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dlm.evaluation import card
from dlm.evaluation.statistics import spearman
from dlm.model_scheduling.exact import Enumerated, MarkovPosterior

SOURCES = {
    "sticky": [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]],
    "lopsided": [[0.9, 0.05, 0.05], [0.3, 0.4, 0.3], [0.1, 0.3, 0.6]],
    "weak": [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]],
}


class Row(TypedDict):
    schedule: str
    light: int
    kl: float
    path: float


def measure(name: str, length: int, reach: int, light: int) -> dict[str, Any]:
    """All schedules of one source; those with `light` steps compared in detail."""
    transition = torch.tensor(SOURCES[name], dtype=torch.float64)
    models = {"H": MarkovPosterior(transition, length), "L": MarkovPosterior(transition, length, reach)}
    found = Enumerated(models, len(transition), length)
    source_S, each = found.distribution("H" * length), found.step_kl("L", "H")
    rows: list[Row] = []
    for keys in track(list(itertools.product("HL", repeat=length)), description=name, transient=True):
        law_S = found.distribution(keys)
        kl = float((source_S * (source_S / law_S).log()).sum())
        rows.append(
            {
                "schedule": "".join(keys),
                "light": keys.count("L"),
                "kl": max(0.0, kl),
                "path": sum(nats for nats, key in zip(each, keys, strict=True) if key == "L"),
            }
        )
    equal = [row for row in rows if row["light"] == light]
    return {
        "source": name,
        "each_step": each,
        "best": min(equal, key=itemgetter("kl")),
        "by_path": min(equal, key=itemgetter("path")),
        "worst": max(equal, key=itemgetter("kl")),
        "mean_kl": sum(row["kl"] for row in equal) / len(equal),
        "rank_agreement": spearman([row["kl"] for row in equal], [row["path"] for row in equal]),
        "bound_holds": all(row["kl"] <= row["path"] + 1e-9 for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--reach", type=int, default=1, help="how far L sees")
    parser.add_argument("--light", type=int, default=4, help="light steps of the schedules that are compared")
    parser.add_argument("--quick", action="store_true", help="one short source: does it run?")
    args = parser.parse_args()
    names = list(SOURCES)[:1] if args.quick else list(SOURCES)
    if args.quick:
        args.length, args.light = 5, 2
    results = [measure(name, args.length, args.reach, args.light) for name in names]
    table = Table("source", "KL of each step", "best", "by path KL", "worst", "mean", "rank agreement", box=None)
    for one in results:
        cells = [f"{one[name]['schedule']} {one[name]['kl']:.4f}" for name in ("best", "by_path", "worst")]
        each = " ".join(f"{nats:.3f}" for nats in one["each_step"])
        table.add_row(str(one["source"]), each, *cells, f"{one['mean_kl']:.4f}", f"{one['rank_agreement']:.3f}")
    Console().print(table)
    Console().print(f"KL from the source in nats a text; schedules with {args.light} of {args.length} light steps, the first step first")
    print(card.dumps(card.make({"results": results}, device="cpu", dtype="float64", seed=0, settings=vars(args), data={})))


if __name__ == "__main__":
    main()
