"""The settings of one training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from dlm.errors import InputError
from dlm.models.config import TransformerConfig
from dlm.noise import loss, process, schedule
from dlm.noise.replacement import HEADS


@dataclass(frozen=True)
class TrainConfig:
    """One run. `--set key=value` changes any field here or of the network. The defaults suit an hour on a laptop."""

    data: str = ""  # shakespeare (bundled) | a text file | a folder of .txt files | hf:DATASET
    val_fraction: float = 0.1
    tokenizer: str = "chars"  # chars | bytes | bpe:1024 (learned from the text) | path of a tokenizer.json
    network: TransformerConfig = field(default_factory=lambda: TransformerConfig(vocab_size=1, width=192))
    objective: str = "diffusion"  # diffusion | autoregressive
    noise: str = "masked"  # masked | uniform | semantic[:lead] | hybrid[:share of uniform noise]
    noise_schedule: str = "linear"
    clusters: str = "classes"  # of semantic noise: classes | MODEL:COUNT (k-means of its output embedding) | a JSON file
    head: str = "leave-one-out"  # what the network gives under replacement noise: leave-one-out | posterior
    estimator: str = "auto"  # any_order (masks, no time input) | counted (replacement) | continuous | auto: the first that applies
    init: str = ""  # a checkpoint to begin with, instead of fresh weights: of the same shape, or deeper
    teacher: str = ""  # a masked model to learn from: its guess takes the place of the text (distillation)
    levels: tuple[float, float] = (0.0, 1.0)  # share of masks that the network is trained on, from .. to
    block_lengths: tuple[int, ...] = ()  # of block diffusion (attention=block_causal), one drawn each step; none: block_length
    context: int = 64
    context_share: float = 0.5  # share of training windows whose first `context` tokens are given
    steps: int = 5000
    batch: int = 16  # windows per step over all processes
    lr: float = 2e-3
    warmup: int = 100
    decay_share: float = 0.3
    betas: tuple[float, float] = (0.9, 0.99)
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
        try:
            alpha = schedule.parse(self.noise_schedule)
            process.parse(self.noise)
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.objective not in ("diffusion", "autoregressive"):
            raise InputError(f"unknown objective {self.objective!r}; known: diffusion, autoregressive")
        if self.objective == "autoregressive" and self.network.attention != "causal":
            raise InputError("an autoregressive network that sees the future learns nothing: --set attention=causal")
        if self.estimator not in ("auto", "any_order", "counted", "continuous"):
            raise InputError(f"unknown estimator {self.estimator!r}; known: auto, any_order, counted, continuous")
        blocks = self.network.attention == "block_causal"
        if blocks and (self.objective != "diffusion" or self.noise != "masked" or self.network.time_conditioning):
            raise InputError("block diffusion (attention=block_causal) is for masked noise without time_conditioning")
        if blocks and not schedule.is_whole(alpha):
            raise InputError(f"the {self.noise_schedule} schedule does not run from 1 to 0: block diffusion needs one that does")
        if blocks and self.estimator != "auto":
            raise InputError(f"block diffusion has one estimator of its own: leave --set estimator={self.estimator} away")
        if self.block_lengths and not blocks:
            raise InputError("block_lengths are for block diffusion: --set attention=block_causal --set block_length=16")
        if any(n < 1 or self.network.window % n for n in self.block_lengths):
            raise InputError(f"every one of block_lengths must divide the window {self.network.window}, got {self.block_lengths}")
        if self.head not in HEADS:
            raise InputError(f"unknown head {self.head!r}; known: {', '.join(HEADS)}")
        if self.clusters != "classes" and self.noise.partition(":")[0] != "semantic":
            raise InputError(f"{self.noise} noise has no clusters: --noise semantic, or leave --set clusters={self.clusters} away")
        if self.estimator == ("counted" if self.noise == "masked" else "any_order"):
            raise InputError(f"{self.noise} noise has no estimator {self.estimator}: --set estimator=auto")
        if self.estimator == "any_order" and self.network.time_conditioning:
            raise InputError("a network with time_conditioning needs --set estimator=continuous")
        if self.estimator in ("any_order", "counted") and not schedule.is_whole(alpha):
            raise InputError(f"the {self.noise_schedule} schedule does not run from 1 to 0: --set estimator=continuous")
        if not 0 <= self.context < self.network.window:
            raise InputError(f"context {self.context} must lie in 0 .. {self.network.window - 1}, below the window")
        least = dict.fromkeys(("steps", "batch", "log_every", "eval_every", "save_every", "eval_passes"), 1)
        for name, low in (least | {"eval_windows": 2, "warmup": 0, "seed": 0, "weight_decay": 0}).items():
            if not getattr(self, name) >= low:
                raise InputError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        if (self.teacher or self.levels != (0, 1)) and (self.estimate != "any_order" or self.objective != "diffusion" or blocks):
            raise InputError("teacher and levels are for bidirectional masked models that do not read the time")
        if len(self.levels) != 2 or not 0 <= self.levels[0] < self.levels[1] <= 1:
            raise InputError(f"levels run from a share of masks to a higher one, as in 0.5,1; got {self.levels}")
        for name in ("context_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in 0 .. 1, got {getattr(self, name)}")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"val_fraction must lie between 0 and 1, got {self.val_fraction}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be at least 0 and below 1, got {self.ema}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise InputError(f"betas must be two numbers from 0 to below 1, as in 0.9,0.99; got {self.betas}")

    @property
    def estimate(self) -> str:
        """The function of `dlm.noise.loss` that estimates the bound."""
        alpha = schedule.parse(self.noise_schedule)
        chosen = loss.best(alpha, masked=self.noise == "masked", reads_time=self.network.time_conditioning)
        return chosen if self.estimator == "auto" else self.estimator

    def with_settings(self, settings: list[str]) -> TrainConfig:
        """Apply `key=value` words together, in any order; InputError for an unknown key or a value that cannot be."""
        own = {f.name for f in fields(self)} - {"network"}
        net = {f.name for f in fields(TransformerConfig)} - {"vocab_size"}
        changes: dict[str, Any] = {}
        for word in settings:
            key, equals, value = word.partition("=")
            if not equals or key not in own | net:
                raise InputError(f"--set {word}: known keys are {', '.join(sorted(own | net))}")
            try:
                changes[key] = _parse(value, getattr(self if key in own else self.network, key))
            except ValueError as error:
                raise InputError(f"--set {word}: {error}") from None
        try:  # all at once: a window and a context may only fit together
            network = self.network.with_(**{k: v for k, v in changes.items() if k in net})
        except ValueError as error:
            raise InputError(f"--set {' '.join(settings)}: {error}") from None
        return replace(self, network=network, **{k: v for k, v in changes.items() if k in own})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainConfig:
        plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        return cls(**(plain | {"network": TransformerConfig(**data["network"])}))


def _parse(value: str, like: Any) -> Any:
    if isinstance(like, bool):
        if value.lower() not in ("true", "false", "1", "0"):
            raise ValueError("give true or false")
        return value.lower() in ("true", "1")
    if isinstance(like, tuple):
        kind = int if all(isinstance(v, int) for v in like) else float
        return tuple(kind(v) for v in value.split(",") if v)
    return type(like)(value)
