"""The inputs of a use case: models and judges by name or as objects, text by its source, and a callback for progress."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dlm import bundled
from dlm.errors import InputError, nearest, unknown
from dlm.evaluation import generative, judge
from dlm.files import check_there
from dlm.formats import native
from dlm.language_model import LanguageModel, load
from dlm.model_scheduling.plan import HEAVY
from dlm.model_scheduling.trial import Figures
from dlm.noise import loss
from dlm.noise.masked import MaskedNoise
from dlm.spelling import Spelling
from dlm.train import data as reading
from dlm.train import data_kinds
from dlm.trajectory import Trajectory

FORMAT = 1  # of every record
Model = str | Path | LanguageModel
Progress = Callable[[int, int], None]
"""Called with (done, total) as the work goes on; the unit is the use case's own."""


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def told(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A use case that tells the nearest name for a keyword that it does not have, as an InputError."""
    known = [name for name, one in inspect.signature(function).parameters.items() if one.kind is not one.POSITIONAL_ONLY]

    @wraps(function)
    def call(*given: Parameters.args, **named: Parameters.kwargs) -> Result:
        if strange := [name for name in named if name not in known]:
            raise unknown(f"option of dlm.{function.__name__}", strange[0], known)
        return function(*given, **named)

    return call


def silent(done: int, total: int) -> None:
    """Progress that is not shown."""


def fields_of(report: Any, *without: str) -> dict[str, Any]:
    """The fields of a frozen dataclass as they are, but for those named."""
    return {one.name: getattr(report, one.name) for one in fields(report) if one.name not in without}


class Counter:
    """Adds up amounts for a `Progress` callback; a use case of several parts has one for all of them."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0
        progress(0, total)

    def add(self, amount: int = 1) -> None:
        self.done += amount
        self.progress(self.done, self.total)


def check_device(device: str) -> None:
    """InputError where torch has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        known, reason = ("cpu", "cuda", "mps"), str(error).splitlines()[0]
        close = "" if device.partition(":")[0] in known else nearest(device, known)
        raise InputError(f"no device {device!r} here" + (close or f" ({reason}): use --device cpu")) from None


def language_model(model: Model, device: str = "cpu") -> LanguageModel:
    """The model itself, or the one of this name loaded on `device`."""
    if isinstance(model, LanguageModel):
        return model
    check_device(device)
    return load(str(model), device=device)


def masked_noise(lm: LanguageModel, why: str) -> MaskedNoise:
    """The noise of a masked diffusion model whose order is random. InputError, which ends in `why`, for another model."""
    if not (lm.is_diffusion and isinstance(lm.noise, MaskedNoise)):
        raise InputError(f"{lm.name} is no masked diffusion model: {why}")
    if not lm.noise.uniform_order:
        raise InputError(f"{lm.name} has learned an order of its positions, where a random one is needed: {why}")
    return lm.noise


def judge_model(model: Model, device: str = "cpu") -> LanguageModel:
    """A model with an exact likelihood. InputError for a diffusion model."""
    lm = language_model(model, device)
    if lm.is_diffusion:
        raise InputError(f"{lm.name} is a diffusion model: a judge must be autoregressive, to have an exact likelihood")
    return lm


def judge_beside(model: Model, lm: LanguageModel, device: str = "cpu") -> LanguageModel:
    """A judge that reads the tokens of `lm`. InputError for another vocabulary or shorter windows."""
    twin = judge_model(model, device)
    if twin.tokenizer.fingerprint() != lm.tokenizer.fingerprint():
        raise InputError(f"{twin.name} has another vocabulary than {lm.name}")
    if twin.window < lm.window:
        raise InputError(
            f"{twin.name} reads windows of {twin.window}, {lm.name} writes {lm.window}: a judge needs windows at least as long"
        )
    return twin


def judge_figures(model: Model, lm: LanguageModel, given: int = 0) -> Figures:
    """Bits, entropy and distinct_4 of every text of `lm` under a judge: by token where it has the same vocabulary, else through text.

    given: tokens at the beginning that are not counted. InputError for a diffusion model, or one that cannot read the texts.
    """
    device, name = str(lm.network.device), model.name if isinstance(model, LanguageModel) else str(model)
    twin = judge_model(model, device) if _is_ours(model) else None
    if twin is None or twin.tokenizer.fingerprint() != lm.tokenizer.fingerprint():
        if given:
            raise InputError(f"{name} has a vocabulary of its own: it judges whole texts, not those after {given} given tokens")
        bits = judge.of_transformers(name, device) if twin is None else _bits_of_text(twin)
        return judge.figures(bits, lm.tokenizer.decode)
    twin = judge_beside(twin, lm)
    return generative.figures(twin.noise, twin.predict, given=given)


def weights(model: Model) -> str:
    """Fingerprint of a model's weights; of a judge that dlm does not read, its name."""
    if isinstance(model, LanguageModel):
        return model.fingerprints({})[HEAVY] if model.path is None else native.digest(model.path)
    return native.digest(native.find(str(model))) if _is_ours(model) else str(model)


def _bits_of_text(twin: LanguageModel) -> judge.TextBits:
    def nats(x_1T: Tensor) -> Tensor:
        x_1T = x_1T.to(twin.network.device)
        return loss.autoregressive(twin.noise, twin.predict, x_1T, torch.ones_like(x_1T, dtype=torch.bool))

    return judge.of_ids(nats, twin.tokenizer.encode, twin.name, twin.window)


def _is_ours(model: Model) -> bool:
    """Whether dlm reads it; a name that nothing is found for counts, so that the error of loading it is told."""
    if isinstance(model, LanguageModel) or str(model) in bundled.models():
        return True
    try:
        return native.is_ours(native.find(str(model)))
    except InputError:
        return True


@dataclass(frozen=True)
class Text:
    """Windows of a text in the tokens of a model. source: where it was read; characters: that begin in the windows; utf8_bytes: in them;
    unit: what a character stands for."""

    source: str
    stream: reading.Stream
    windows_WT: Tensor
    characters: int
    utf8_bytes: int
    unit: str

    @classmethod
    def read(
        cls,
        lm: LanguageModel,
        data: str | Path | None,
        *,
        split: str = "val",
        val_fraction: float = 0.1,
        window: int | None = None,
        max_windows: int | None = None,
    ) -> Text:
        """data: as of `dlm.train.data.read`; None is the text that the model was trained on. window: tokens, by default the model's.
        max_windows: at most so many, spread evenly over the text. InputError where there is no text."""
        source = str(lm.config.training.get("data", "") if data is None else data)
        kind = data_kinds.find(source)
        stream = _stream(lm, source, kind, split, val_fraction, window or lm.window)
        windows_WT = stream.windows(max_windows)
        spelling, unit = lm.tokenizer.spelling, kind.unit if kind else "character"
        sizes = characters(spelling, windows_WT), utf8_bytes(spelling, windows_WT)
        return cls(source, stream, windows_WT.to(lm.network.device), *sizes, unit)


def characters(spelling: Spelling, windows_WT: Tensor) -> int:
    """How many characters begin in these windows: each counts once, also where a window or a token cuts it."""
    return _count(spelling, windows_WT, lambda inner: sum(byte & 0xC0 != 0x80 for byte in inner))  # not the rest of one in UTF-8


def utf8_bytes(spelling: Spelling, windows_WT: Tensor) -> int:
    """How many bytes of UTF-8 these windows spell."""
    return _count(spelling, windows_WT, len)


def _count(spelling: Spelling, windows_WT: Tensor, each: Callable[[bytes], int]) -> int:
    tokens, counts = torch.unique(windows_WT, return_counts=True)
    return sum(count * each(spelling.part(token).inner) for token, count in zip(tokens.tolist(), counts.tolist(), strict=True))


def _stream(
    lm: LanguageModel, source: str, kind: data_kinds.DataKind | None, split: str, val_fraction: float, window: int
) -> reading.Stream:
    if kind is None:
        return reading.Stream.encode(reading.select(reading.read(source), split, val_fraction), lm.tokenizer, window)
    if lm.tokenizer.fingerprint() != kind.tokenizer().fingerprint():
        raise InputError(f"{lm.name} does not know the {kind.unit}s of {source}: train a model with dlm train --data {source}")
    if (cells := kind.settings.get("window", lm.window)) != lm.window:
        raise InputError(f"{lm.name} reads {lm.window} {kind.unit}s, {source} has {cells}: train a model with dlm train --data {source}")
    return kind.stream(split, window, val_fraction)


def saved_run(path: str | Path) -> Trajectory:
    """A run that `dlm generate --save` wrote. InputError where the file is missing or damaged."""
    check_there(Path(path), f"make one with dlm generate --save {path}")
    return Trajectory.load(Path(path))
