"""ARC tasks of `dlm solve`: one is watched, several are counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from dlm.cli.app import note
from dlm.cli.progress import run_to_end, showing
from dlm.errors import InputError, nearest
from dlm.grids.arc import COLOURS, PALETTE, Task
from dlm.language_model import LanguageModel
from dlm.language_model.options import DecodingOptions
from dlm.train import data_kinds
from dlm.train.arc import ArcData
from dlm.workflows import arc as workflow
from dlm.workflows.arc import Answer, Attempting
from dlm.workflows.inputs import FORMAT

UNSOLVED = 1  # exit code


def tasks_of(source: str, split: str, name: str | None) -> list[Task] | None:
    """The tasks that `dlm solve SOURCE` names, or the one of that name; None for a source of something else."""
    entry = data_kinds.entry(source)
    data = entry.make(source) if entry is not None and data_kinds.is_word(source) else None
    if not isinstance(data, ArcData):
        return None
    tasks = data.tasks("all" if name else split)
    if not tasks:  # of a source without parts that is too small to be split
        tasks = data.tasks("all")
    if name is None:
        return tasks
    if name not in (known := {task.name: task for task in tasks}):
        raise InputError(f"{source} has no task {name!r}" + (nearest(name, known) or ""))
    return [known[name]]


def count_tasks(lm: LanguageModel, tasks: list[Task], options: DecodingOptions, views: int, seed: int, as_json: bool) -> None:
    """The count over many tasks, as a line."""
    with showing("tasks") as progress:
        found = workflow.score(lm, tasks, options=options, views=views, seed=seed, progress=progress)
    share, of_fitting = found.solved / max(1, found.tasks), found.solved / max(1, found.fitting)
    note(f"{found.model}, {found.sampler}, {found.views} views: {found.solved} of {found.tasks} tasks solved ({share:.1%})")
    note(f"{found.fitting} tasks fit, of which {of_fitting:.1%} are solved; the shape is right in {found.shapes:.1%} of their answers")
    note(f"and {found.cells:.1%} of the cells; answers that copy their inputs would have {found.copied:.1%}")
    if as_json:
        print(json.dumps(found.record()))
    if found.solved < found.tasks:
        sys.exit(UNSOLVED)


def watch_task(
    lm: LanguageModel,
    task: Task,
    options: DecodingOptions,
    *,
    views: int,
    seed: int,
    live: bool,
    save: Path | None,
    as_json: bool,
) -> None:
    """One task, drawn: its demonstrations, each test input and the attempts."""
    if save is not None and len(task.tests) > 1:
        raise InputError(f"--save keeps the run of one test, and {task.name} has {len(task.tests)}: leave it away")
    console = Console(stderr=as_json)
    found: list[Answer] = []
    for test in range(len(task.tests)):
        attempting = Attempting(lm, task, test, options, views=views, seed=seed)
        run_to_end(attempting, save, console if live and console.is_terminal else None)
        found.append(attempting.result())
        draw(found[-1], Console(stderr=as_json, highlight=False))
    if as_json:
        print(json.dumps({"format": FORMAT, "model": lm.name, "answers": [one.record() for one in found]}))
    if not all(one.solved for one in found):
        sys.exit(UNSOLVED)


def draw(found: Answer, console: Console) -> None:
    """The attempts side by side in ARC's colours, and what became of them."""
    from rich.columns import Columns
    from rich.text import Text

    from dlm.viz.palette import ink_on

    pictures = []
    for grid in found.attempts:
        text = Text()
        for row in grid.tolist():
            for cell in row:
                text.append(f"{cell} ", style=f"{ink_on(PALETTE[cell])} on {PALETTE[cell]}" if 0 <= cell < COLOURS else "")
            text.append("\n")
        pictures.append(text)
    console.print(Columns(pictures, padding=(0, 4)))
    verdict = {True: "solved", False: "not solved", None: "its answer is not told"}[found.solved]
    votes = " and ".join(map(str, found.votes)) or "no"
    cells = f", {found.cells:.0%} of the cells right" if found.cells is not None else ""
    note(f"{found.task}: {verdict}{cells}; {votes} votes, {found.forwards} forward passes, {found.seconds:.2f} s")
