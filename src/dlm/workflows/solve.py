"""Solve a puzzle: its holes are drawn by a sampler, the rules check the answer, and what they reject is masked and drawn again.

Shapes: B = 1 row, T cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dlm import bundled
from dlm.errors import InputError
from dlm.grids import kinds
from dlm.grids.grid import HOLES, RULES, Cells, Grid, cells_of, parse, written
from dlm.language_model import LanguageModel
from dlm.language_model.generation import Callback, Stepping, trajectory
from dlm.language_model.options import DecodingOptions
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas, Frame, Trajectory
from dlm.workflows.inputs import FORMAT, Model, fields_of, language_model

SAMPLER, TRIES = "margin", 8
KEPT = 0.5  # share of the cells without a conflict that stay after a failed try


@dataclass(frozen=True)
class Solution:
    """answer: a line of characters, right by the rules where `solved`. unique: whether the puzzle has no other solution.

    forwards: forward passes of all tries together; conflicts: cells of the last try that break a rule.
    """

    puzzle: str
    answer: str
    solved: bool
    unique: bool
    holes: int
    tries: int
    forwards: int
    seconds: float
    conflicts: int
    sampler: str
    seed: int
    model: str
    trajectory: Trajectory = field(repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """The figures, as `dlm solve --json` prints them."""
        return {"format": FORMAT} | fields_of(self, "trajectory")


def kind_of(model: LanguageModel) -> Grid:
    """The kind of grid that a model was trained on. InputError for a model of text."""
    kind = kinds.find(str(model.config.training.get("data", "")))
    if kind is None or not model.is_diffusion:
        raise InputError(f"{model.name} is no diffusion model of grids: train one with dlm train sudoku-4, or with --data sudoku:9")
    return kind


def usual_model(text: str) -> str:
    """The bundled model for a puzzle, by the number of its cells and by its symbols. InputError where there is none."""
    found = [c for c in text if c not in RULES and c not in "\r\n"]
    sizes = []
    for name, data in bundled.sources().items():
        kind = kinds.find(data)
        if kind is not None and cells_of(kind) == len(found) and not set(found) - {*kind.symbols, *HOLES}:
            return name
        sizes += [f"{name} {cells_of(kind)} cells of {kind.symbols}"] if kind is not None else []
    raise InputError(f"neither a file nor a puzzle of a bundled model ({', '.join(sizes)}): other grids need --model runs/mine")


class Solving(Stepping):
    """A puzzle under way: call `step` until it gives None, then `result`. Its trajectory joins all tries; a cell counts as settled once the
    rules have accepted the grid.

    options: how the holes are drawn, by default by margin, the likeliest symbol, one cell a forward pass. InputError for a puzzle that is
    no grid of the model, breaks a rule, or has no solution.
    """

    def __init__(self, model: LanguageModel, puzzle: str, options: DecodingOptions, *, tries: int = TRIES, seed: int = 0) -> None:
        self.model, self.kind, self.tries, self.seed = model, kind_of(model), tries, seed
        self.cells = parse(self.kind, puzzle)
        self.unique = check(self.kind, self.cells)
        holes = max(1, self.cells.count(None))
        usual = replace(options, sampler=options.sampler or SAMPLER, steps=options.steps or holes)
        plan = model.resolve(replace(usual, temperature=0.0 if options.temperature is None else options.temperature))
        self.word, self.sampler = plan.word, model.build(plan)
        self.canvas = Canvas.from_rows([self.cells], fill=model.tokenizer.mask_id)
        about = {"seed": seed, "sampler": plan.word, "window": model.window, "revises": True}
        self.solved, self.tried = not self.cells.count(None), 0
        super().__init__(trajectory(model, self.canvas, **about, grid=model.grid), self._run())

    def _run(self) -> Iterator[Frame]:
        canvas, done = self.canvas, 0
        if self.solved:  # a grid without holes, which is right
            return
        for tried in range(self.tries):
            self.tried = tried + 1
            rng = generators(self.seed + 1000 * tried, 1)
            last = None
            for frame in self.sampler.steps(canvas.to(self.model.network.device), rng=rng):
                if last is not None:
                    yield last
                last = replace(frame, forwards=done + frame.forwards, settled_BT=~self.canvas.free_BT)
            assert last is not None
            done, found_T = last.forwards, last.tokens_BT[0].cpu()
            conflicts = self.kind.conflicts(self._cells(found_T))
            self.solved = not conflicts and self.model.tokenizer.mask_id not in found_T
            if self.solved:
                yield replace(last, settled_BT=torch.ones_like(self.canvas.free_BT))
                return
            yield last
            canvas = self._opened(found_T, conflicts, tried)

    def _cells(self, tokens_T: Tensor) -> list[int | None]:
        mask = self.model.tokenizer.mask_id
        return [None if token == mask else token for token in tokens_T.tolist()]

    def _opened(self, found_T: Tensor, conflicts: list[int], tried: int) -> Canvas:
        """The grid with cells in conflict masked again, and a random part of the others that were written: one of them is wrong as well.
        All of them where that would mask none, since a conflict may lie at given cells alone."""
        kept_T = torch.rand(len(found_T), generator=torch.Generator().manual_seed(self.seed + 1000 * tried + 1)) < KEPT
        kept_T[conflicts] = False
        kept_T &= found_T != self.model.tokenizer.mask_id
        free_BT = self.canvas.free_BT & ~kept_T
        return replace(self.canvas, tokens_BT=found_T[None], free_BT=free_BT if free_BT.any() else self.canvas.free_BT)

    def result(self) -> Solution:
        """So far."""
        answer = self._cells(self.trajectory.current_BT[0])
        return Solution(
            puzzle=written(self.kind, self.cells),
            answer=written(self.kind, answer),
            solved=self.solved,
            unique=self.unique,
            holes=self.cells.count(None),
            tries=self.tried,
            forwards=self.trajectory.forwards[-1],
            seconds=self.seconds,
            conflicts=len(self.kind.conflicts(answer)),
            sampler=self.word,
            seed=self.seed,
            model=self.model.name,
            trajectory=self.trajectory,
        )


def check(kind: Grid, cells: Cells) -> bool:
    """Whether a puzzle has one solution alone. InputError where it breaks a rule or has none."""
    if wrong := kind.conflicts(cells):
        places = ", ".join(f"row {cell // kind.axes[-1] + 1} column {cell % kind.axes[-1] + 1}" for cell in wrong[:2])
        raise InputError(f"this puzzle breaks a rule already: {kind.broken} at {places}")
    found = list(itertools.islice(kind.completions(cells), 2))
    if not found:
        raise InputError("this puzzle has no solution: check its given cells")
    return len(found) == 1


def solve(
    model: Model,
    puzzle: str,
    *,
    options: DecodingOptions | None = None,
    tries: int = TRIES,
    seed: int = 0,
    device: str = "cpu",
    callback: Callback | None = None,
) -> Solution:
    """Solve one puzzle, a text as of `dlm.grids.grid.parse`; the rules decide whether the answer is right.

    options: as of `LanguageModel.sampler`; tries: after a failed one, the cells in conflict and half of the others are masked and drawn
    again. callback(trajectory, frame): called after every step. InputError as of `Solving`.
    """
    solving = Solving(language_model(model, device), puzzle, options or DecodingOptions(), tries=tries, seed=seed)
    solving.finish(callback)
    return solving.result()
