"""Sudoku by every sampler: how many puzzles each solves in its first try, and how many forward passes it takes.

    python benchmarks/grids.py                                            # all minimal puzzles that the seeds give, sudoku-4
    python benchmarks/grids.py --model sudoku-9 --clues 36,0,expert --puzzles 30 --retried 30 --samplers orders

A puzzle has one solution; the rules alone judge. Puzzles of 9 x 9 are made by `qqwing` where it is installed (a Debian package; it takes no
seed), else by our own search from the seeds. They are minimal; up to --clues, random cells of the solution are given as well. A pass is
counted for a puzzle until its last cell is settled. `tries` is `dlm solve`: cells in conflict and half of the others are drawn again. For
grids of 4 x 4 the bound stands beside the entropy, log 288. Measured runs are kept in --rows, so that an interrupted call goes on. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dlm.adapters.lora import fingerprint
from dlm.bench.rows import Rows
from dlm.cli.progress import showing
from dlm.evaluation import card
from dlm.evaluation.enumerated import excess
from dlm.evaluation.statistics import standard_error
from dlm.grids.grid import Cells, Grid, cells_of, parse, written
from dlm.language_model import LanguageModel, load
from dlm.language_model.options import DecodingOptions
from dlm.noise.masked import MaskedNoise
from dlm.sampling import registry
from dlm.trajectory import Canvas
from dlm.workflows.solve import kind_of, solve

ENUMERATED = 16  # cells of a Sudoku whose 288 grids are all known
GENERATOR = "qqwing"
ORDERS = "first-hitting,topk,entropy,margin,confidence,confidence:0.99,entropy-bound,tiny-topk:4"
"""Random, max probability, least entropy and largest margin at one cell a pass, then rules that write all sure cells, or four, at once."""

Puzzle = list[int | None]


@dataclass(frozen=True)
class Row:
    """clues: as asked for; solved: share of the puzzles, its error over seeds; passes: forward passes a puzzle; per_pass: solved a pass."""

    sampler: str
    clues: str
    solved: float
    stderr: float
    passes: float

    @property
    def per_pass(self) -> float:
        return self.solved / self.passes


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    lm = load(args.model)
    kind = kind_of(lm)
    usable = [one.name for one in registry.usable(lm.kind) if not one.needs_a_name]
    names = {"orders": ORDERS}.get(args.samplers, args.samplers).split(",") if args.samplers else usable
    made_by = GENERATOR if args.generator != "own" and kind.word == "sudoku:9" and shutil.which(GENERATOR) else "own"
    if made_by == "own" and not args.clues.replace(",", "").isdigit():
        raise SystemExit(f"puzzles by difficulty are made by {GENERATOR}: install it, or give numbers of cells")
    weights = fingerprint(lm.network)
    kept = Rows(args.rows.with_name("quick-grids.jsonl") if args.quick else args.rows)
    found: dict[str, Any] = {"rows": [], "clues": {}, "retried": {}, "generator": made_by}
    for clues in args.clues.split(","):
        puzzles = (packaged if made_by == GENERATOR else own)(kind, args.seeds, args.puzzles, clues)
        given = sum(len(cells) - cells.count(None) for part in puzzles for cells in part) / (args.seeds * args.puzzles)
        title = f"{lm.name}, {args.seeds} x {args.puzzles} puzzles by {made_by}, {given:.1f} given cells of {cells_of(kind)}"
        rows = measured(lm, names, puzzles, clues, kept, weights)
        show(title, rows)
        found["rows"] += [asdict(row) | {"per_pass": row.per_pass} for row in rows]
        found["clues"][clues] = given
        found["retried"][clues] = retried(lm, puzzles, args.tries, args.retried or args.seeds * args.puzzles, kept, weights)
    if cells_of(kind) == ENUMERATED and isinstance(lm.noise, MaskedNoise):
        bound = excess(lm.noise, lm.predict, kind.corpus("all"))
        share = bound.excess / bound.entropy
        print(f"bound {bound.bound:.4f} +- {bound.stderr:.4f} nats a grid, the entropy is {bound.entropy:.4f}: {share:.2%} above")
        found |= {"bound": asdict(bound)}
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    print(card.dumps(card.make(found, device="cpu", dtype="float32", seed=0, settings=settings, data={"source": kind.word})))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sudoku-4")
    parser.add_argument("--puzzles", type=int, default=100, help="of each seed")
    parser.add_argument("--clues", default="0", help="given cells, with commas; 0: a minimal puzzle; expert: one of that difficulty")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--retried", type=int, default=0, help="puzzles of each number of given cells for dlm solve; 0: all")
    parser.add_argument("--samplers", default="", help=f"names with commas; orders: {ORDERS}; default: all for masked noise")
    parser.add_argument("--generator", choices=("auto", "own"), default="auto", help=f"auto: {GENERATOR} for 9 x 9, where it is installed")
    parser.add_argument("--rows", type=Path, default=Path("runs/grids.jsonl"), help="measured runs")
    parser.add_argument("--quick", action="store_true", help="few puzzles, three samplers: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.puzzles, args.seeds, args.samplers = 4, 2, "margin,topk,first-hitting"
    return args


def own(kind: Grid, seeds: int, count: int, clues: str) -> list[list[Puzzle]]:
    """So many puzzles of each seed."""
    return [[kind.puzzle(10_000 * (seed + 1) + i, int(clues)) for i in range(count)] for seed in range(seeds)]


def packaged(kind: Grid, seeds: int, count: int, clues: str) -> list[list[Puzzle]]:
    """Minimal puzzles of 9 x 9 by the packaged generator, of a difficulty or with random cells of their solutions up to `clues`. All are
    made in one call, since two calls within a second would make the same ones."""
    least, difficulty = (int(clues), "any") if clues.isdigit() else (0, clues)
    command = [GENERATOR, "--generate", str(seeds * count), "--difficulty", difficulty, "--one-line", "--solution", "--csv"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[1:]
    rng, found = random.Random(0), []
    for line in lines:
        cells, answer = (parse(kind, part) for part in line.split(",")[:2])
        holes = [i for i, cell in enumerate(cells) if cell is None]
        for cell in rng.sample(holes, max(0, least - len(cells) + len(holes))):
            cells[cell] = answer[cell]
        found.append(cells)
    return [found[seed * count :][:count] for seed in range(seeds)]


def named(puzzles: Sequence[Puzzle]) -> str:
    """A name for these puzzles, by their cells: the packaged generator makes others each time."""
    return hashlib.sha256(repr(puzzles).encode()).hexdigest()[:16]


def measured(
    lm: LanguageModel, names: Sequence[str], puzzles: Sequence[Sequence[Puzzle]], clues: str, kept: Rows, weights: str
) -> list[Row]:
    """Every sampler at temperature 0, a step a cell, on the puzzles of every seed; the one that solves most a pass is first."""
    rows = []
    with showing(f"samplers, {clues} given") as progress:
        for done, name in enumerate(names):
            progress(done, len(names))
            tried = [
                kept.row(name, [weights, named(part)], seed, measure=partial(first_try, lm, name, part, seed), told=told)
                for seed, part in enumerate(puzzles)
            ]
            solved = torch.tensor([row["solved"] for row in tried], dtype=torch.float64)
            passes = sum(row["passes"] for row in tried) / len(tried)
            rows.append(Row(name, clues, solved.mean().item(), standard_error(solved).item(), passes))
    return sorted(rows, key=lambda row: -row.per_pass)


def told(row: dict[str, Any]) -> str:
    return f"{row['solved']:.1%} solved, {row['passes']:.1f} passes a puzzle"


def first_try(lm: LanguageModel, name: str, puzzles: Sequence[Puzzle], seed: int) -> dict[str, float]:
    """The share solved, and forward passes a puzzle."""
    kind, canvas = kind_of(lm), Canvas.from_rows(puzzles, fill=lm.tokenizer.mask_id)
    run = lm.run(canvas, DecodingOptions(sampler=name, steps=lm.window, temperature=0.0), seed=1000 * seed)
    run.finish()
    made = run.trajectory
    found: list[Cells] = [[None if token == made.mask_id else token for token in row] for row in made.current_BT.tolist()]
    solved = sum(not kind.conflicts(cells) and None not in cells for cells in found)
    last = made.settled_BT.amax(-1).tolist()
    return {"solved": solved / len(puzzles), "passes": sum(made.forwards[k] for k in last) / len(puzzles)}


def show(title: str, rows: Sequence[Row]) -> None:
    table = Table("sampler", "solved, %", "passes a puzzle", "solved a pass", box=None)
    for row in rows:
        table.add_row(row.sampler, f"{100 * row.solved:.1f} +- {100 * row.stderr:.1f}", f"{row.passes:.1f}", f"{row.per_pass:.3f}")
    Console(width=100).print(title, table)


def retried(lm: LanguageModel, puzzles: Sequence[Sequence[Puzzle]], tries: int, most: int, kept: Rows, weights: str) -> dict[str, float]:
    """`dlm solve` on the first `most` of them, with retries."""
    parts = [part[: max(0, most - seed * len(part))] for seed, part in enumerate(puzzles)]

    def attempts(part: Sequence[Puzzle], seed: int) -> dict[str, Any]:
        found = [solve(lm, written(kind_of(lm), cells), tries=tries, seed=seed * len(puzzles[0]) + i) for i, cells in enumerate(part)]
        return {"puzzles": len(found), "solved": sum(one.solved for one in found), "passes": sum(one.forwards for one in found)}

    found = [
        kept.row("dlm solve", [weights, named(part)], seed, tries, measure=partial(attempts, part, seed), told=of_all)
        for seed, part in enumerate(parts)
        if part
    ]
    count, solved, passes = (sum(row[name] for row in found) for name in ("puzzles", "solved", "passes"))
    print(f"dlm solve, margin, up to {tries} tries: {of_all({'puzzles': count, 'solved': solved, 'passes': passes})}")
    return {"solved": solved, "puzzles": count, "passes": passes / count}


def of_all(row: dict[str, Any]) -> str:
    return f"{row['solved']} of {row['puzzles']} in {row['passes'] / row['puzzles']:.1f} passes a puzzle"


if __name__ == "__main__":
    main()
