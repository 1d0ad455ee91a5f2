"""`dlm.fit`: train a model on a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlm.formats.native import ModelConfig
from dlm.language_model import LanguageModel
from dlm.models.transformer import Transformer
from dlm.text.tokenizer import Tokenizer
from dlm.train import processes, recipes, setup, state, training
from dlm.train.config import TrainConfig
from dlm.train.display import Display
from dlm.train.log import Log
from dlm.train.loop import Loop, Tell
from dlm.train.processes import Processes
from dlm.workflows.inputs import FORMAT, told


@dataclass(frozen=True)
class Fit:
    """A run that ended at `step`; `out` loads as a checkpoint.

    Losses are nats per token: train_nats the mean since the last line of the log, val_nats the bound (or the exact loss) of the
    averaged weights on the validation part, with its standard error. None where the run was too short to measure it.
    """

    out: Path
    step: int
    train_nats: float | None = None
    val_nats: float | None = None
    val_stderr: float | None = None
    best_val_nats: float | None = None
    tokens_per_second: float | None = None

    def record(self) -> dict[str, Any]:
        """The JSON of `dlm train --json`."""
        figures = {name: value for name, value in asdict(self).items() if value is not None and name != "out"}
        return {"format": FORMAT} | figures | {"model": str(self.out)}


@told
def fit(
    config: TrainConfig | str,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Tell | None = None,
    preview: training.Preview | None = None,
    stop_after: int | None = None,
) -> Fit:
    """Train a config, or the recipe of that name, into the directory `out`, which is a loadable checkpoint after every save.

    resume: go on from the state in `out`. progress: called at every step, and for every message; by default a bar, or lines, on
    standard error. preview: text of the model in training, shown beside every validation. stop_after: leave after that step, as Ctrl-C
    would. Raises KeyboardInterrupt after saving when interrupted; InputError for data or settings that cannot work.
    """
    config, out = recipes.find(config) if isinstance(config, str) else config, Path(out)
    accelerator = processes.accelerate(config.batch, bf16=config.bf16)
    meta = state.begin(out, "train", resume=resume, optimizer=config.optimizer)
    changed = training.changes(config, meta, out) if resume else ""
    found = setup.resolve(config, out if resume else None)
    training.check_text(found, config.data, meta, out)
    task = training.Training(config, found, accelerator, out, meta, preview)
    if accelerator.is_main_process:
        state.clear(out)
    first = meta.get("step", 0)
    log = Log(out, first, tensorboard=config.tensorboard, main=accelerator.is_main_process)
    with log, shown(progress) as tell:
        loop = Loop(task, config, log, Processes(accelerator), tell, "training", first, meta.get("recent", []))
        loop.say(task.describe())
        for line in filter(None, (task.warning(), task.precision())):
            loop.say(line)
        if changed:
            loop.say(f"changed since the last save: {changed}")
        return Fit(out, **loop.run(stop_after))


@contextmanager
def shown(progress: Tell | None, unit: str = "nats per token") -> Iterator[Tell]:
    """The callback that is given, or a display on standard error."""
    if progress is not None:
        yield progress
    else:
        with Display(unit=unit) as display:
            yield display


def sample(network: Transformer, config: ModelConfig, tokenizer: Tokenizer) -> str:
    """A `preview`: one line of text, so that one sees it learn."""
    network.eval()
    text: str = LanguageModel(network, config, tokenizer).generate(max_new_tokens=min(64, config.network.window), steps=32).text
    return "  " + text.replace("\n", "\u21b5")
