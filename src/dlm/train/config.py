"""The settings of one training run, and the checks that they pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

from dlm import seeds
from dlm.errors import InputError, nearest, unknown
from dlm.models.config import TransformerConfig
from dlm.noise import loss, process, schedule
from dlm.noise.classes import ClassNoise
from dlm.noise.gaussian import GaussianNoise
from dlm.noise.learned import COPIES, LearnedNoise
from dlm.noise.masked import MaskedNoise
from dlm.noise.replacement import HEADS, ReplacementNoise
from dlm.noise.uniform import UniformNoise
from dlm.protocols import NoiseProcess, NoiseSchedule
from dlm.train import data_kinds
from dlm.train.optimisers import OPTIMISERS

OBJECTIVES = ("diffusion", "autoregressive")
WEIGHTS = ("auto", "bound", "equal", "anneal")
CLUSTERED = ("semantic", "classes")  # noise that reads clusters
ESTIMATORS = ("auto", "any_order", "counted", "two_clocks", "continuous")


@dataclass(frozen=True)
class TrainConfig:
    """One run. `--set key=value` changes any field here or of the network. The defaults suit an hour on a laptop.

    noise and noise_schedule take a word, or in Python an object: a process for the vocabulary of the run, which has a schedule of its
    own, or its class. InputError for settings that cannot work.
    """

    data: str = ""  # shakespeare (bundled) | a text file | a folder of .txt files | hf:DATASET | sudoku[:size] | maze[:size] | FASTA | .npy
    val_fraction: float = 0.1
    tokenizer: str = "chars"  # chars | bytes | bpe:1024 (learned from the text) | path of a tokenizer.json
    network: TransformerConfig = field(default_factory=lambda: TransformerConfig(vocab_size=1, width=192, conv=5))
    objective: str = "diffusion"  # diffusion | autoregressive
    noise: str | NoiseProcess | type[Any] = "masked"  # masked | uniform | semantic | hybrid | ordered | genmd4 | gaussian | classes
    noise_schedule: str | NoiseSchedule = "linear"
    clusters: str = "classes"  # of semantic and class noise: classes | MODEL:COUNT (k-means of its embedding) | JSON file | shuffled:...
    head: str = "leave-one-out"  # prediction of the network under replacement noise: leave-one-out | posterior
    mixtures: float = 0.0  # of uniform noise: the network reads mixtures of tokens at a temperature that falls from here to 0; 0: tokens
    estimator: str = "auto"  # any_order (masks, no time input) | counted (replacement) | two_clocks (classes) | continuous | auto
    init: str = ""  # a checkpoint to begin with, instead of fresh weights: of the same shape, or deeper
    teacher: str = ""  # distillation: a masked model whose predictions take the place of the text
    weights: str = "auto"  # of masked tokens: bound | equal (mask ratios from Beta(2, 2), each alike) | anneal: equal, bound in the decay
    levels: tuple[float, float] = (0.0, 1.0)  # share of masks that the network is trained on, from .. to
    block_lengths: tuple[int, ...] = ()  # of block diffusion (attention=block_causal), one drawn each step; none: block_length
    context: int = 64
    context_share: float = 0.5  # share of training windows whose first `context` tokens, or a puzzle's cells, are given
    augment: bool = True  # training windows come under the symmetries of their data: those of a grid, either strand of DNA
    steps: int = 5000
    batch: int = 16  # windows per step over all processes
    optimizer: str = "muon"  # muon (AdamW beside it, at a tenth of its rate: lr) | adamw
    lr: float = 2e-3
    warmup: int = 100
    decay_share: float = 0.3
    betas: tuple[float, float] = (0.9, 0.99)
    noise_lr: float = 1e-2  # of the weights of ordered noise and genmd4; 0 keeps them as they are
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    tensorboard: bool = False
    log_every: int = 20
    eval_every: int = 250
    eval_passes: int = 2  # Monte-Carlo passes over (a part of) the validation windows
    eval_windows: int = 256
    save_every: int = 250

    def __post_init__(self) -> None:
        if (kind := data_kinds.find(self.data)) is not None:
            self._fit_to(kind)
        try:
            noise = process.name_of(self.noise) if isinstance(self.noise, type) else self.noise
            object.__setattr__(self, "noise", noise)
            if isinstance(noise, str):
                process.parse(noise)
            else:
                process.settings(noise)  # a checkpoint can name it
            schedule.word(self.alpha)
        except ValueError as error:
            raise InputError(str(error)) from None
        for wrong in chain.from_iterable(check(self) for check in CHECKS):
            raise InputError(wrong)

    def _fit_to(self, kind: data_kinds.DataKind) -> None:
        """Take the settings that the data decides."""
        own = {f.name for f in fields(self)}
        try:
            network = self.network.with_(**{key: value for key, value in kind.settings.items() if key not in own})
        except ValueError as error:
            raise InputError(f"{self.data}: {error}") from None
        object.__setattr__(self, "network", network)
        for key in own & kind.settings.keys():
            object.__setattr__(self, key, kind.settings[key])

    @property
    def alpha(self) -> NoiseSchedule:
        """The schedule of the noise."""
        if not isinstance(self.noise, str | type):
            return self.noise.schedule
        return schedule.parse(self.noise_schedule) if isinstance(self.noise_schedule, str) else self.noise_schedule

    @property
    def schedule_word(self) -> str:
        """The word of that schedule, as it was given or as `schedule.word` has it."""
        given = isinstance(self.noise, str) and isinstance(self.noise_schedule, str)
        return str(self.noise_schedule) if given else schedule.word(self.alpha)

    @property
    def process(self) -> str:
        """The name of the noise process."""
        return self.noise.partition(":")[0] if isinstance(self.noise, str) else process.name_of(type(self.noise))

    @property
    def blocks(self) -> bool:
        """Whether this is block diffusion."""
        return self.network.attention == "block_causal"

    @property
    def estimate(self) -> str:
        """The function of `dlm.noise.loss` that estimates the bound."""
        if self.estimator != "auto":
            return self.estimator
        kind = process.PROCESSES[self.process]
        if issubclass(kind, ClassNoise) and not self.network.time_conditioning:
            return "two_clocks"
        if not issubclass(kind, MaskedNoise | ReplacementNoise):
            return "continuous"  # which needs no more of a process than its protocol
        return loss.best(self.alpha, masked=issubclass(kind, MaskedNoise), reads_time=self.network.time_conditioning)

    @property
    def equal_steps(self) -> int:
        """The first steps, which weight every masked token alike."""
        auto = _weighable(self) and self.levels == (0, 1) and not self.teacher
        weights = ("equal" if auto else "bound") if self.weights == "auto" else self.weights
        return {"bound": 0, "equal": self.steps, "anneal": self.steps - round(self.steps * self.decay_share)}[weights]

    def with_settings(self, settings: list[str]) -> TrainConfig:
        """Apply `key=value` words together, in any order; InputError for an unknown key or a value that cannot be."""
        own = {f.name for f in fields(self)} - {"network"}
        net = {f.name for f in fields(TransformerConfig)} - {"vocab_size", "experts", "axes", "groups"}
        changes: dict[str, Any] = {}
        for word in settings:
            key, equals, value = word.partition("=")
            if not equals or key not in own | net:
                close = "" if key in own | net else nearest(key, own | net).replace("; ", "") + " "
                raise InputError(f"--set {word}: {close.lstrip()}known keys are {', '.join(sorted(own | net))}")
            try:
                changes[key] = _parse(value, getattr(self if key in own else self.network, key))
            except ValueError as error:
                raise InputError(f"--set {word}: {error}") from None
        of_network = {key: value for key, value in changes.items() if key in net}
        try:  # all at once: a window and a context may only fit together
            network = self.network.with_(**of_network)
        except ValueError as error:
            reason = _head_sizes(self.network, of_network) or str(error)
            raise InputError(f"--set {' '.join(settings)}: {reason}") from None
        return replace(self, network=network, **{key: value for key, value in changes.items() if key in own})

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON can hold it, objects by the words or entries that make them again."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)} | {"network": self.network.to_dict()}
        if not isinstance(self.noise, str | type):
            plain["noise"] = process.settings(self.noise)
        if not isinstance(self.noise_schedule, str):
            plain["noise_schedule"] = schedule.word(self.noise_schedule)
        return plain


def _objective(c: TrainConfig) -> Iterator[str]:
    if c.objective not in OBJECTIVES:
        yield str(unknown("objective", c.objective, OBJECTIVES))
    if c.optimizer not in OPTIMISERS:
        yield str(unknown("optimizer", c.optimizer, OPTIMISERS))
    if c.estimator not in ESTIMATORS:
        yield str(unknown("estimator", c.estimator, ESTIMATORS))
    if c.objective == "autoregressive" and c.network.attention != "causal":
        yield "an autoregressive network that sees the future learns nothing: --set attention=causal"


def _block_diffusion(c: TrainConfig) -> Iterator[str]:
    if c.blocks and (c.objective != "diffusion" or c.process != "masked" or c.network.time_conditioning):
        yield "block diffusion (attention=block_causal) is for masked noise without time_conditioning"
    if c.blocks and not schedule.is_whole(c.alpha):
        yield f"the {c.schedule_word} schedule does not run from 1 to 0: block diffusion needs one that does"
    if c.blocks and c.estimator != "auto":
        yield f"block diffusion has one estimator of its own: leave --set estimator={c.estimator} away"
    if c.block_lengths and not c.blocks:
        yield "block_lengths are for block diffusion: --set attention=block_causal --set block_length=16"
    if any(n < 1 or c.network.window % n for n in c.block_lengths):
        yield f"every one of block_lengths must divide the window {c.network.window}, got {c.block_lengths}"


def _noise(c: TrainConfig) -> Iterator[str]:
    noise = c.noise if isinstance(c.noise, str) else c.process
    if not isinstance(c.noise, str) and c.noise_schedule != "linear":
        yield f"the {noise} noise that is given has a schedule of its own: leave noise_schedule away"
    if c.head not in HEADS:
        yield str(unknown("head", c.head, HEADS))
    if c.clusters != "classes" and c.process not in CLUSTERED:
        yield f"{noise} noise has no clusters: --noise semantic or classes, or leave --set clusters={c.clusters} away"
    kind = process.PROCESSES[c.process]
    forms = {"any_order": MaskedNoise, "counted": ReplacementNoise, "two_clocks": ClassNoise}
    fitting = {name: issubclass(kind, suited) for name, suited in forms.items()}
    if not fitting.get(c.estimator, True):
        yield f"{noise} noise has no estimator {c.estimator}: --set estimator=auto"
    if c.estimator in ("any_order", "two_clocks") and c.network.time_conditioning:
        yield "a network with time_conditioning needs --set estimator=continuous"
    if c.estimator in fitting and not schedule.is_whole(c.alpha):
        yield f"the {c.schedule_word} schedule does not run from 1 to 0: --set estimator=continuous"


def _weighable(c: TrainConfig) -> bool:
    """Whether tokens can be weighted alike: masks of every ratio, by count or by time, or the noise says how."""
    if issubclass(process.PROCESSES[c.process], LearnedNoise):
        return c.objective == "diffusion" and c.estimator == "auto"
    if issubclass(process.PROCESSES[c.process], GaussianNoise):
        return c.objective == "diffusion"
    if c.process == "masked" and c.network.time_conditioning:
        return c.objective == "diffusion" and c.estimator == "auto" and schedule.is_whole(c.alpha)
    counted = {"masked": "any_order", "classes": "two_clocks"}.get(c.process)
    return c.objective == "diffusion" and counted is not None and (c.blocks or c.estimate == counted)


def _learned(c: TrainConfig) -> Iterator[str]:
    kind = process.PROCESSES[c.process]
    if not issubclass(kind, LearnedNoise):
        return
    if c.objective != "diffusion" or c.blocks or c.teacher or c.levels != (0, 1) or c.estimator != "auto":
        yield f"{c.process} noise has its own loss: leave objective, block diffusion, teacher, levels and estimator away"
    if c.network.time_conditioning != kind.reads_time:
        reads = "reads" if kind.reads_time else "does not read"
        yield f"a network under {c.process} noise {reads} the time: --set time_conditioning={str(kind.reads_time).lower()}"
    if c.batch % COPIES:
        yield f"learned weights compare two draws of noise for each text: batch must be even, got {c.batch}"


def _vectors(c: TrainConfig) -> Iterator[str]:
    if issubclass(process.PROCESSES[c.process], GaussianNoise) and (c.objective != "diffusion" or c.network.attention != "full"):
        yield f"{c.process} noise needs a bidirectional diffusion model: leave objective and attention away"


def _mixtures(c: TrainConfig) -> Iterator[str]:
    if c.mixtures and (c.objective != "diffusion" or not issubclass(process.PROCESSES[c.process], UniformNoise)):
        yield f"mixtures of tokens are inputs under uniform noise: --noise uniform, or leave --set mixtures={c.mixtures:g} away"


def _weights(c: TrainConfig) -> Iterator[str]:
    if c.weights not in WEIGHTS:
        yield str(unknown("weights", c.weights, WEIGHTS))
    if c.weights in ("equal", "anneal") and not _weighable(c):
        yield f"weights={c.weights} is for masks whose share runs from 1 to 0, and noise on vectors: --set estimator=auto or weights=bound"


def _numbers(c: TrainConfig) -> Iterator[str]:
    if not 0 <= c.context < c.network.window:
        yield f"context {c.context} must lie in 0 .. {c.network.window - 1}, below the window"
    for name, (low, high, words) in RANGES.items():
        if not low <= getattr(c, name) <= high:
            yield f"{name} must {words}, got {getattr(c, name)}"
    if len(c.betas) != 2 or not all(0 <= b < 1 for b in c.betas):
        yield f"betas must be two numbers from 0 to below 1, as in 0.9,0.99; got {c.betas}"


def _distillation(c: TrainConfig) -> Iterator[str]:
    if (c.teacher or c.levels != (0, 1)) and (c.estimate != "any_order" or c.objective != "diffusion" or c.blocks):
        yield "teacher and levels are for bidirectional masked models that do not read the time"
    if len(c.levels) != 2 or not 0 <= c.levels[0] < c.levels[1] <= 1:
        yield f"levels run from a share of masks to a higher one, as in 0.5,1; got {c.levels}"


CHECKS: tuple[Callable[[TrainConfig], Iterator[str]], ...] = (
    _objective,
    _block_diffusion,
    _noise,
    _learned,
    _vectors,
    _mixtures,
    _weights,
    _numbers,
    _distillation,
)
"""Each yields an error in a line; the user reads the first one."""

ABOVE_0, BELOW_1 = math.nextafter(0, 1), math.nextafter(1, 0)
FINITE = math.nextafter(math.inf, 0)
RANGES: dict[str, tuple[float, float, str]] = {  # lowest, highest, and the same in words
    **dict.fromkeys(("steps", "batch", "log_every", "eval_every", "save_every", "eval_passes"), (1, math.inf, "be at least 1")),
    **dict.fromkeys(("warmup", "weight_decay"), (0, math.inf, "be at least 0")),
    **dict.fromkeys(("noise_lr", "mixtures"), (0, FINITE, "be at least 0")),
    "seed": (seeds.LOWEST, seeds.HIGHEST, "lie in -2**63 .. 2**63 - 1"),
    "eval_windows": (2, math.inf, "be at least 2"),
    **dict.fromkeys(("lr", "clip"), (ABOVE_0, FINITE, "be above 0")),
    **dict.fromkeys(("context_share", "decay_share"), (0, 1, "lie in 0 .. 1")),
    "val_fraction": (ABOVE_0, BELOW_1, "lie between 0 and 1"),
    "ema": (0, BELOW_1, "be at least 0 and below 1"),
}


def _parse(value: str, like: object) -> object:
    if isinstance(like, bool):
        if value.lower() not in ("true", "false", "1", "0"):
            raise ValueError("give true or false")
        return value.lower() in ("true", "1")
    if isinstance(like, tuple):
        kind = int if all(isinstance(v, int) for v in like) else float
        return tuple(_number(v, kind) for v in value.split(",") if v)
    return _number(value, type(like)) if isinstance(like, int | float) else value


def _number(value: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{value!r} is no {'whole ' * (kind is int)}number") from None


def _head_sizes(network: TransformerConfig, changes: dict[str, Any]) -> str:
    """Why heads do not divide this width evenly, and what would fit; nothing where something else is wrong."""
    width, heads = changes.get("width", network.width), changes.get("heads", network.heads)
    if (
        not {"width", "heads"} & changes.keys()
        or changes.keys() & {"head_dim", "kv_heads"}
        or min(width, heads) < 1
        or width // heads % 2 == 0
    ):
        return ""
    step = 2 * heads
    widths = sorted({max(step, width // step * step), (width // step + 1) * step})
    counts = [n for n in range(1, width // 2 + 1) if width % (2 * n) == 0]
    near = sorted({max((n for n in counts if n < heads), default=0), min((n for n in counts if n > heads), default=0)} - {0})
    fits = f"width={' or '.join(map(str, widths))}" + (f", or heads={' or '.join(map(str, near))}" if near else "")
    return f"{heads} heads of width {width} have an odd head_dim of {width // heads}, which must be even: {fits} fits"
