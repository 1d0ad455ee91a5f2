"""How fast the text of saved runs settles: when each token last changed, edits per token, bits on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dlm.errors import InputError
from dlm.evaluation.generative import judge_bits_each
from dlm.evaluation.settling import Judge as Bits
from dlm.evaluation.settling import Settling, label_of, settling
from dlm.language_model import LanguageModel
from dlm.trajectory import Trajectory
from dlm.workflows.inputs import FORMAT, Counter, Model, Progress, judge_model, saved_run, silent, told


@dataclass(frozen=True)
class SettlingReport:
    """Runs of one model and sampler are pooled, in the order in which they came."""

    runs: tuple[Settling, ...]

    def record(self) -> dict[str, object]:
        """As `dlm settle --json` prints it."""
        return {"format": FORMAT, "runs": [one.record() for one in self.runs]}


@told
def settle(
    trajectories: Sequence[Trajectory | str | Path], judge: Model | None = None, *, device: str = "cpu", progress: Progress = silent
) -> SettlingReport:
    """Measure runs, or the files that `dlm generate --save` wrote of them.

    judge: an autoregressive model of the same vocabulary, for bits per token at the frames on the way. progress counts groups of runs.
    InputError for runs of one label with different numbers of steps, a missing file, or another vocabulary.
    """
    groups: dict[str, list[Trajectory]] = {}
    for one in trajectories:
        run = one if isinstance(one, Trajectory) else saved_run(one)
        groups.setdefault(label_of(run), []).append(run)
    if not groups:
        raise InputError("no run to measure: give the files of dlm generate --save")
    lm = None if judge is None else judge_model(judge, device)
    bits, vocab_size = (None, 0) if lm is None else (_bits(lm, groups), lm.tokenizer.vocab_size)
    count, found = Counter(progress, len(groups)), []
    for label, runs in groups.items():
        found.append(settling(runs, label=label, judge=bits, vocab_size=vocab_size))
        count.add()
    return SettlingReport(tuple(found))


def _bits(lm: LanguageModel, groups: dict[str, list[Trajectory]]) -> Bits:
    """Bits per token of whole texts. InputError where the runs have another vocabulary."""
    for run in (run for group in groups.values() for run in group):
        if not run.spelling.same(lm.tokenizer.spelling):
            raise InputError(f"{lm.name} has another vocabulary than a run of {run.meta.get('model', 'these files')}")

    def bits(x_BT: Tensor) -> Tensor:
        return judge_bits_each(lm.noise, lm.predict, x_BT.to(lm.network.device))

    return bits
