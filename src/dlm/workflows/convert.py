"""`dlm.convert`: teach an autoregressive model to draft several tokens in a forward pass."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dlm.adapters import distillation_data, train
from dlm.adapters.distillation_data import Rows
from dlm.adapters.objective import Acceptance
from dlm.adapters.train import ConvertConfig
from dlm.errors import InputError
from dlm.formats import native
from dlm.language_model import LanguageModel
from dlm.train import state
from dlm.train.log import Log
from dlm.train.loop import Loop, Progress, Tell
from dlm.train.processes import Processes
from dlm.workflows.fit import shown
from dlm.workflows.inputs import FORMAT, Model, language_model, told


@dataclass(frozen=True)
class SelfDistillation:
    """Learn from so many texts that the base writes itself. prompts: they begin with these, in turns; temperatures: in turns.

    InputError for fewer than two texts, or a temperature that cannot be.
    """

    texts: int
    prompts: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.texts < 2:
            raise InputError(f"--self-distill counts texts from 2: one to learn from, one to measure on; got {self.texts}")
        if not self.temperatures or not all(0 <= one < math.inf for one in self.temperatures):
            raise InputError(f"--temperatures is one or more numbers from 0 with commas between, as in 0,1; got {self.temperatures}")


@dataclass(frozen=True)
class Conversion:
    """A conversion that ended at `step`; `out` holds an adapter, heads, or with `full` a checkpoint.

    nats: mean training loss per mask since the last line of the log. accept: the chance that a draft token is accepted, by slot, on
    held-out rows at temperature 1; greedy at temperature 0; `_before` of the base before the first step. tokens_per_forward: what that
    is worth, by a chain of draft tokens and by a tree. Empty or None where the run was too short to measure it.
    """

    base: str
    out: Path
    stride: int
    heads: int
    full: bool
    step: int
    nats: float | None = None
    tokens_per_second: float | None = None
    accept_before: list[float] = field(default_factory=list)
    accept: list[float] = field(default_factory=list)
    greedy_before: list[float] = field(default_factory=list)
    greedy: list[float] = field(default_factory=list)
    tokens_per_forward: float | None = None
    tokens_per_forward_tree: float | None = None

    def record(self) -> dict[str, Any]:
        """The JSON of `dlm convert --json`."""
        figures = {name: value for name, value in asdict(self).items() if value is not None and value != []}
        return {"format": FORMAT} | figures | {"out": str(self.out)}

    def describe(self) -> tuple[str, str]:
        """A line for before and one for after."""
        before, after = Acceptance(self.accept_before, self.greedy_before), Acceptance(self.accept, self.greedy)
        return train.describe(before), train.describe(after)


@told
def convert(
    model: Model,
    data: str | SelfDistillation | Rows,
    out: str | Path,
    *,
    config: ConvertConfig | None = None,
    resume: bool = False,
    progress: Tell | None = None,
    stop_after: int | None = None,
) -> Conversion:
    """Train into the directory `out`: an adapter for the model, or with `config.heads` those, or with `config.full` a checkpoint.

    model: an autoregressive one; its network then has the adapter, or the new weights. data: what `dlm.train.data.read` reads, texts
    that the model writes itself, or rows. resume, progress, stop_after: as of `dlm.fit`. Raises KeyboardInterrupt after saving when
    interrupted; InputError for a model, data or settings that cannot work.
    """
    lm = language_model(model)
    config, out = config or ConvertConfig(), Path(out)
    base = train.Base(lm.name, lm.network, lm.tokenizer.mask_id, _is_autoregressive(lm), lambda path, made: _save_full(lm, path, made))
    config.check(base)
    meta = state.begin(out, "convert", resume=resume, optimizer=config.optimizer)
    with shown(progress, unit="nats per mask") as tell:
        rows = _rows(lm, data, out, config, tell)
        task = train.Conversion(base, config, rows, out, meta)
        state.clear(out)
        first = meta.get("step", 0)
        with Log(out, first, tensorboard=False, main=True) as log:
            processes = Processes(device=base.network.device)
            loop = Loop(task, config, log, processes, tell, "converting", first, meta.get("recent", []))
            loop.say(task.describe())
            if not meta:
                before = task.measure_before()
                log.write(0, **before.logged)
                loop.say(before.text)
            figures = loop.run(stop_after)
    lm.network.requires_grad_(False)
    return Conversion(lm.name, out, config.stride, config.heads, config.full, **figures)


def _is_autoregressive(lm: LanguageModel) -> bool:
    return not lm.is_diffusion and lm.config.network.attention == "causal"


def _save_full(lm: LanguageModel, out: Path, made: dict[str, Any]) -> None:
    files = lm.files() | {"README.md": lm.card(str(out))}
    native.save(out, lm.network.state_dict(), replace(lm.config, training=made), files=files)


def _rows(lm: LanguageModel, data: str | SelfDistillation | Rows, out: Path, config: ConvertConfig, tell: Tell) -> Rows:
    start = lm.config.start_token_id
    if isinstance(data, Rows):
        return data
    if isinstance(data, str):
        return distillation_data.from_text(data, lm.tokenizer, start, config.length)
    label = f"{lm.name} writes"
    distillation_data.write(
        lm,
        out / distillation_data.FILE,
        data.texts,
        config.length,
        prompts=data.prompts,
        temperatures=data.temperatures,
        seed=config.seed,
        tell=lambda done: tell(Progress(label, done, data.texts, measured=False)),
    )
    return distillation_data.from_base(out / distillation_data.FILE, start, config.length)
