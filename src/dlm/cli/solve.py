"""`dlm solve`: fill in the holes of a puzzle, watched as it settles; the rules check the answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dlm.cli.app import (
    SAMPLING,
    Device,
    Json,
    Seed,
    Threads,
    app,
    between,
    err,
    given_text,
    is_run_name,
    is_sampler,
    load,
    note,
    one_name,
    one_of,
    sampler_word,
    set_threads,
)
from dlm.cli.progress import run_to_end
from dlm.errors import InputError
from dlm.files import read_text

if TYPE_CHECKING:
    from dlm.workflows.solve import Solution

UNSOLVED = 1  # exit code


@app.command()
def solve(
    puzzle: Annotated[
        str,
        typer.Argument(
            metavar="PUZZLE",
            help="Cells row by row, . or 0 for a hole; a file of puzzles, one a line or drawn; - reads them; arc:TASKS for ARC tasks.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", show_default="the bundled one of that size", help="Bundled name or directory of a model of grids."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The same.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            callback=is_sampler,
            show_default="margin",
            help="NAME or NAME:SETTING; dlm samplers says what each does.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(callback=between(1), show_default="one for each hole", help="Denoising steps of each try.", rich_help_panel=SAMPLING),
    ] = None,
    temperature: Annotated[
        float, typer.Option(callback=between(0), help="0 takes the likeliest symbol of a cell.", rich_help_panel=SAMPLING)
    ] = 0.0,
    tries: Annotated[
        int,
        typer.Option(callback=between(1), help="After a failed try, cells in conflict and half of the others are masked and drawn again."),
    ] = 8,
    task: Annotated[str | None, typer.Option(help="Of ARC tasks the one of this name; without it all are counted.")] = None,
    split: Annotated[str, typer.Option(callback=one_of("train", "val", "all"), help="Of ARC tasks: train | val | all.")] = "val",
    views: Annotated[
        int, typer.Option(callback=between(1), help="Symmetries and colours under which an ARC task is predicted, to vote.")
    ] = 8,
    seed: Seed = 0,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="See the grid settle.")] = False,
    save: Annotated[
        Path | None, typer.Option(callback=is_run_name, help="Write the run of one puzzle as a .traj file for dlm show.")
    ] = None,
    as_json: Json = False,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Solve puzzles with a model of grids.

    Exit code 0: all are solved; 1: some are not.
    """
    from dlm.cli.arc import count_tasks, tasks_of, watch_task
    from dlm.grids.grid import puzzles
    from dlm.language_model.options import DecodingOptions
    from dlm.train import data_kinds
    from dlm.workflows import arc
    from dlm.workflows.solve import Solving, usual_model

    named = one_name(name, model)
    options = DecodingOptions(sampler=sampler_word(sampler), steps=steps, temperature=temperature)
    if data_kinds.is_word(puzzle) and (tasks := tasks_of(puzzle, split, task)) is not None:
        if len(tasks) > 1 and (watch or save is not None):
            raise InputError(f"--watch and --save are for one task, not {len(tasks)}: add --task {tasks[0].name}, or another one")
        lm = load(named or arc.usual_model(puzzle), device)
        set_threads(threads, [lm])
        if len(tasks) == 1:
            watch_task(lm, tasks[0], options, views=views, seed=seed, live=watch, save=save, as_json=as_json)
        else:
            count_tasks(lm, tasks, options, views, seed, as_json)
        return
    texts = puzzles(_text(puzzle))
    if not texts:
        raise InputError("no puzzle: give its cells row by row, with . for a hole")
    if save is not None and len(texts) > 1:
        raise InputError(f"--save keeps the run of one puzzle, and there are {len(texts)}: leave it away")
    lm = load(named or usual_model(texts[0]), device)
    set_threads(threads, [lm])
    console = Console(stderr=as_json)
    begun = [Solving(lm, text, options, tries=tries, seed=seed) for text in texts]  # every bad one is told before the first is solved
    found = []
    for solving in begun:
        watching = watch and console.is_terminal
        run_to_end(solving, save, console if watching else None)
        found.append(solving.result())
        _tell(found[-1], as_json, watching)
    solved = sum(one.solved for one in found)
    if len(found) > 1:
        passes = sum(one.forwards for one in found)
        note(f"{solved} of {len(found)} puzzles solved in {passes} forward passes")
    if as_json:
        print(json.dumps(found[0].record() if len(found) == 1 else {"solved": solved, "puzzles": [one.record() for one in found]}))
    if solved < len(found):
        sys.exit(UNSOLVED)


def _text(puzzle: str) -> str:
    """The puzzles themselves: from a file of that name, from standard input for `-`, else the text that is given."""
    if len(puzzle) < 256 and Path(puzzle).is_file():
        return read_text(Path(puzzle))
    return given_text(puzzle)


def _tell(found: Solution, as_json: bool, watched: bool) -> None:
    """The grid, unless it has been watched, and a line about it."""
    from dlm.viz.layout import framed, looks, pieces

    run = found.trajectory
    if not as_json and not watched:
        shown: Sequence[str] = framed(run, 0, pieces(run, 0, "."), looks(run, 0))[0]
        sys.stdout.write("".join(shown) + "\n")
        sys.stdout.flush()
    verdict = "solved" if found.solved else f"not solved, {found.conflicts} cells break a rule"
    tries = f" and {found.tries} tries" if found.tries > 1 else ""
    passes = f"{found.holes} holes in {found.forwards} forward passes{tries}"
    note(f"{found.model}, {found.sampler}: {verdict}; {passes}, {found.seconds:.2f} s")
    if not found.unique:
        err.print("this puzzle has several solutions: one is shown", highlight=False, soft_wrap=True)
