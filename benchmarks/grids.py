"""Sudoku by every sampler: how many puzzles each solves in its first try, and how many forward passes it takes.

    python benchmarks/grids.py                                            # all minimal puzzles that the seeds give, sudoku-4
    python benchmarks/grids.py --model runs/sudoku-9 --clues 36 --samplers margin,topk,first-hitting

A puzzle has one solution; the rules alone judge. A pass is counted for a puzzle until its last cell is settled. `tries` is `dlm solve`:
cells in conflict and half of the others are drawn again. For grids of 4 x 4 the bound stands beside the entropy, log 288.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dlm.cli.progress import showing
from dlm.evaluation import card
from dlm.evaluation.enumerated import excess
from dlm.evaluation.statistics import standard_error
from dlm.grids.grid import Cells, cells_of, written
from dlm.language_model import LanguageModel, load
from dlm.language_model.options import DecodingOptions
from dlm.noise.masked import MaskedNoise
from dlm.sampling import registry
from dlm.trajectory import Canvas
from dlm.workflows.solve import kind_of, solve

ENUMERATED = 288  # grids of 4 x 4


@dataclass(frozen=True)
class Row:
    """solved: share of the puzzles, its error over seeds; passes: forward passes a puzzle; per_pass: solved a forward pass."""

    sampler: str
    solved: float
    stderr: float
    passes: float

    @property
    def per_pass(self) -> float:
        return self.solved / self.passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sudoku-4")
    parser.add_argument("--puzzles", type=int, default=100, help="of each seed")
    parser.add_argument("--clues", type=int, default=0, help="given cells; 0: as few as leave one solution")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--samplers", default="", help="names with commas; default: all for masked noise")
    parser.add_argument("--quick", action="store_true", help="few puzzles, three samplers: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.puzzles, args.seeds, args.samplers = 4, 2, "margin,topk,first-hitting"
    torch.set_num_threads(1)
    lm = load(args.model)
    kind = kind_of(lm)
    usable = [one.name for one in registry.usable(lm.kind) if not one.needs_a_name]
    names = args.samplers.split(",") if args.samplers else usable
    puzzles = [[kind.puzzle(10_000 * (seed + 1) + i, args.clues) for i in range(args.puzzles)] for seed in range(args.seeds)]
    clues = sum(len(cells) - cells.count(None) for part in puzzles for cells in part) / (args.seeds * args.puzzles)
    with showing("samplers") as progress:
        rows = []
        for done, name in enumerate(names):
            progress(done, len(names))
            rows.append(measured(lm, name, puzzles))
    table = Table("sampler", "solved, %", "passes a puzzle", "solved a pass", box=None)
    for row in sorted(rows, key=lambda row: -row.per_pass):
        table.add_row(row.sampler, f"{100 * row.solved:.1f} +- {100 * row.stderr:.1f}", f"{row.passes:.1f}", f"{row.per_pass:.3f}")
    Console(width=100).print(f"{lm.name}, {args.seeds} x {args.puzzles} puzzles, {clues:.1f} given cells of {cells_of(kind)}", table)
    found = {"rows": [asdict(row) | {"per_pass": row.per_pass} for row in rows], "clues": clues}
    retried = [solve(lm, written(kind, cells), tries=args.tries, seed=seed) for seed, part in enumerate(puzzles) for cells in part]
    solved, passes = sum(one.solved for one in retried), sum(one.forwards for one in retried)
    print(f"dlm solve, margin, up to {args.tries} tries: {solved} of {len(retried)} in {passes / len(retried):.1f} passes a puzzle")
    found |= {"retried": {"solved": solved, "puzzles": len(retried), "passes": passes / len(retried)}}
    if len(grids := kind.corpus("all")) == ENUMERATED and isinstance(lm.noise, MaskedNoise):
        bound = excess(lm.noise, lm.predict, grids)
        share = bound.excess / bound.entropy
        print(f"bound {bound.bound:.4f} +- {bound.stderr:.4f} nats a grid, the entropy is {bound.entropy:.4f}: {share:.2%} above")
        found |= {"bound": asdict(bound)}
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    print(card.dumps(card.make(found, device="cpu", dtype="float32", seed=0, settings=settings, data={"source": kind.word})))


def measured(lm: LanguageModel, name: str, puzzles: list[list[list[int | None]]]) -> Row:
    """One sampler at temperature 0, a step a cell, on the puzzles of every seed."""
    shares, passes = [], []
    for seed, part in enumerate(puzzles):
        right, counts = first_try(lm, name, part, seed)
        shares.append(right)
        passes.append(counts)
    solved = torch.tensor(shares, dtype=torch.float64)
    return Row(name, solved.mean().item(), standard_error(solved).item(), sum(passes) / len(passes))


def first_try(lm: LanguageModel, name: str, puzzles: list[list[int | None]], seed: int) -> tuple[float, float]:
    """(share solved, forward passes a puzzle)."""
    kind, canvas = kind_of(lm), Canvas.from_rows(puzzles, fill=lm.tokenizer.mask_id)
    run = lm.run(canvas, DecodingOptions(sampler=name, steps=lm.window, temperature=0.0), seed=1000 * seed)
    while run.step() is not None:
        pass
    made = run.trajectory
    found: list[Cells] = [[None if token == made.mask_id else token for token in row] for row in made.current_BT.tolist()]
    solved = sum(not kind.conflicts(cells) and None not in cells for cells in found)
    last = made.settled_BT.amax(-1).tolist()
    return solved / len(puzzles), sum(made.forwards[k] for k in last) / len(puzzles)


if __name__ == "__main__":
    main()
