"""One generation: the run while it goes on, and what came of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dlm import seeds
from dlm.language_model.protocols import Model
from dlm.language_model.resolution import DecodingPlan
from dlm.protocols import Sampler
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas, Frame, Trajectory


@dataclass(frozen=True)
class Generation:
    """One generated text and its cost.

    tokens and tokens_per_forward count generated tokens, without the prompt; forwards counts forward passes, each shared by the whole
    batch. With until_settled: steps_saved, and expected_edits, the number of tokens that the saved steps would have changed by the
    model's own probabilities. turns: forward passes by model, of a schedule of several. accepted: of the `proposed` draft tokens, from
    speculative decoding.
    """

    text: str
    tokens: int
    seconds: float
    forwards: int
    tokens_per_forward: float
    steps: int
    sampler: str
    seed: int
    model: str
    trajectory: Trajectory = field(repr=False, compare=False)
    row: int = 0
    turns: dict[str, int] | None = None
    steps_saved: int | None = None
    expected_edits: float | None = None
    proposed: int | None = None
    accepted: int | None = None

    def __str__(self) -> str:
        return self.text

    def record(self) -> dict[str, Any]:
        """The figures, as `dlm generate --json` prints them."""
        names = ("text", "tokens", "seconds", "forwards", "tokens_per_forward", "steps", "sampler", "seed", "model")
        adaptive = ("steps_saved", "expected_edits") if self.steps_saved is not None else ()
        several = ("turns",) if self.turns is not None else ()
        verified = ("proposed", "accepted") if self.proposed is not None else ()
        return {name: getattr(self, name) for name in (*names, *several, *adaptive, *verified)}


Callback = Callable[[Trajectory, Frame], None]


def trajectory(model: Model, canvas: Canvas, **meta: Any) -> Trajectory:
    """An empty trajectory of this model, ready to `append` the frames of a run on `canvas`."""
    tokenizer = model.tokenizer
    start_BT = torch.where(canvas.free_BT, tokenizer.mask_id, canvas.tokens_BT)
    return Trajectory(start_BT, canvas, pieces=tokenizer.spelling, mask_id=tokenizer.mask_id, meta={"model": model.name} | meta)


class Stepping:
    """A run under way: call `step` until it gives None, or `finish`.

    seconds: the time that this run alone has taken; last: its last frame.
    """

    def __init__(self, trajectory: Trajectory, frames: Iterator[Frame]) -> None:
        self.trajectory, self._frames = trajectory, frames
        self.seconds, self.last = 0.0, None  # type: float, Frame | None

    def step(self) -> Frame | None:
        """The next frame, put into the trajectory; None at the end."""
        begin = time.perf_counter()
        frame = next(self._frames, None)
        self.seconds += time.perf_counter() - begin
        if frame is not None:
            self.trajectory.append(frame, seconds=self.seconds)
            self.last = frame
        return frame

    def finish(self, callback: Callback | None = None) -> None:
        """Every step that is left. callback(trajectory, frame): called after each."""
        while (frame := self.step()) is not None:
            if callback is not None:
                callback(self.trajectory, frame)


class Run(Stepping):
    """A generation under way: call `step` until it gives None, then `results`. Several can take turns.

    Row i of the canvas draws with seed + i. plan: the resolved options; sampler: built from it.
    """

    def __init__(self, model: Model, canvas: Canvas, seed: int, plan: DecodingPlan, sampler: Sampler) -> None:
        self.model, self.canvas, self.seed, self.word = model, canvas, seed, plan.word
        revises = bool(getattr(sampler, "revises", False))
        about = {"seed": seed, "sampler": plan.word, "window": model.window, "revises": revises}
        rng = generators(seed, len(canvas.tokens_BT))
        frames = sampler.steps(canvas.to(model.network.device), rng=rng)
        super().__init__(trajectory(model, canvas, **about, **plan.record()), frames)

    def results(self) -> list[Generation]:
        """One for each row."""
        saved_B, doubt_B = (self.last.saved_B, self.last.doubt_B) if self.last is not None else (None, None)
        run, canvas, forwards = self.trajectory, self.canvas, self.trajectory.forwards[-1]
        turns = dict(Counter(key for keys in run.models[1:] for key in keys)) if run.meta.get("schedule") else None
        results = []
        for row in range(len(canvas.tokens_BT)):
            ids = run.current_BT[row][canvas.valid_BT[row]]
            written_T = canvas.free_BT[row] & (run.current_BT[row] != self.model.tokenizer.mask_id)
            new = int(written_T.sum())  # a text that ends by itself leaves the rest open
            end = next((i for i in written_T.nonzero().flatten().tolist() if int(ids[i]) in self.model.stops), None)
            results.append(
                Generation(
                    text=self.model.tokenizer.decode(ids[:end].tolist()),
                    tokens=new,
                    seconds=self.seconds,
                    forwards=forwards,
                    tokens_per_forward=new / max(1, forwards),
                    steps=len(run) - 1,
                    sampler=self.word,
                    seed=seeds.after(self.seed, row),
                    model=self.model.name,
                    trajectory=run,
                    row=row,
                    turns=turns,
                    steps_saved=None if saved_B is None else int(saved_B[row]),
                    expected_edits=None if doubt_B is None else float(doubt_B[row]),
                    proposed=int(run.drafted_B[row]) if run.has_drafts else None,
                    accepted=int(run.accepted_B[row]) if run.has_drafts else None,
                )
            )
        return results
