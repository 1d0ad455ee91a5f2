"""The likelihood of a text under a model: exact for autoregressive models, an upper bound with its error for diffusion models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ParamSpec

from torch import Tensor

from dlm.errors import InputError, in_range
from dlm.evaluation import card as cards
from dlm.evaluation import likelihood
from dlm.language_model import LanguageModel
from dlm.noise.masked import MaskedNoise
from dlm.noise.score import ScoreNoise
from dlm.workflows.inputs import FORMAT, Counter, Model, Progress, Text, language_model, silent, told

CALL_LOGITS = 1 << 27  # logits of one forward pass at most: with a large vocabulary fewer windows are read at once
CALL_WINDOWS = 32
Inputs = ParamSpec("Inputs")


@dataclass(frozen=True)
class Evaluation(likelihood.Likelihood):
    """The figures of `Likelihood`, and how they came about. block_length: of block diffusion, else 0; steps: of the discrete estimator.
    temperature: that the logits were divided by.

    bits_per_byte: of UTF-8, which compares models of any tokenizer. source, split, fingerprint, windows, window: the text, its tokens and
    how it was cut. unit: what a character of it stands for. card: the file with all of it.
    nats_per_predicted_token: of a model without start token, whose first token of a window has no condition and counts as uniform; without
    those tokens, as other tools leave them out.
    """

    bits_per_byte: float
    model: str
    source: str
    split: str
    fingerprint: str
    windows: int
    window: int
    seed: int
    device: str
    dtype: str
    unit: str = "character"
    block_length: int = 0
    steps: int | None = None
    card: Path | None = None
    nats_per_predicted_token: float | None = None
    temperature: float = 1.0

    def figures(self) -> dict[str, object]:
        """Nats per token, bits per character and per byte and their errors, with the name of the model."""
        every = asdict(self)
        names = [
            *likelihood.Likelihood.__dataclass_fields__,
            "bits_per_byte",
            "unit",
            "model",
            *(["block_length"] if self.block_length else []),
            *(["temperature"] if self.temperature != 1 else []),
        ]
        names += ["nats_per_predicted_token"] if self.nats_per_predicted_token is not None else []
        return {name: every[name] for name in names if (name, every[name]) != ("parts", None)}

    def record(self) -> dict[str, object]:
        """As `dlm eval --json` prints it."""
        return {"format": FORMAT} | self.figures() | ({"card": str(self.card)} if self.card else {})

    def save(self, path: Path) -> None:
        """Write the evaluation card, which repeats the number."""
        names = ("estimator", "steps", "window", "temperature")
        settings = {name: getattr(self, name) for name in names} | {"passes": self.samples, "block_length": self.block_length or None}
        data = {"source": self.source, "split": self.split, "fingerprint": self.fingerprint, "windows": self.windows}
        made = cards.make(self.figures(), device=self.device, dtype=self.dtype, seed=self.seed, settings=settings, data=data)
        cards.write(made, path)


@dataclass(frozen=True)
class Evaluations:
    """One model, at several block lengths perhaps, and a second one on the same text."""

    own: Sequence[Evaluation]
    against: Evaluation | None = None

    def record(self) -> Mapping[str, object]:
        """As `dlm eval --json` prints it."""
        found = self.own[0].record() if len(self.own) == 1 else {"format": FORMAT, "block_lengths": [one.record() for one in self.own]}
        return found | ({"against": self.against.record()} if self.against else {})


@told
def evaluate(
    model: Model,
    data: str | Path,
    *,
    split: str = "val",
    val_fraction: float = 0.1,
    estimator: str = "auto",
    block_length: int | None = None,
    window: int | None = None,
    temperature: float = 1.0,
    passes: int = 4,
    steps: int = 256,
    max_windows: int | None = None,
    seed: int = 0,
    card: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Evaluation:
    """Nats per token and bits per character of a text.

    data: a text file, a folder of .txt files, a bundled data set or `hf:DATASET`; split: train, val (the last `val_fraction`) or all.
    estimator: any-order (masks), counted (replacement noise), two-clocks (classes), continuous, score-entropy (SEDD) or discrete; auto: the
    first that applies.
    block_length: of block diffusion, by default the model's own; window: of autoregressive models, tokens that are read together.
    temperature: of masked and autoregressive models, the likelihood under the distributions that are drawn from at this temperature.
    passes: Monte-Carlo passes over the text; steps: of the discrete estimator; max_windows: at most so many, spread over the text.
    card: a file for the evaluation card. progress counts windows times passes. InputError for options that the model does not have.
    """
    lm = language_model(model, device)
    length = _block_length(lm, block_length)
    _check_window(lm, window)
    _check_temperature(lm, temperature)
    if lm.is_diffusion and estimator not in likelihood.ESTIMATORS:
        raise InputError(f"unknown estimator {estimator!r}; known: {', '.join(likelihood.ESTIMATORS)}")
    text = Text.read(lm, data, split=split, val_fraction=val_fraction, window=window, max_windows=max_windows)
    found = likelihood.evaluate(
        lm.noise,
        _at(temperature, lm.predict),
        text.windows_WT,
        characters=text.characters,
        estimator=estimator if lm.is_diffusion else "autoregressive",
        passes=passes,
        steps=steps,
        seed=seed,
        beside=_at(temperature, lm.predict_beside) if length else None,
        block_length=length,
        reads_time=lm.config.network.time_conditioning,
        progress=Counter(progress, len(text.windows_WT) * (passes if lm.is_diffusion else 1)).add,
        batch=max(1, min(CALL_WINDOWS, CALL_LOGITS // (text.stream.window * lm.config.network.vocab_size))),
    )
    made = Evaluation(
        **asdict(found),
        bits_per_byte=found.bits_per_char * text.characters / text.utf8_bytes,
        unit=text.unit,
        model=lm.name,
        source=text.source,
        split=split,
        fingerprint=text.stream.fingerprint(),
        windows=len(text.windows_WT),
        window=text.stream.window,
        seed=seed,
        device=str(lm.network.device),
        dtype=str(lm.network.embed.weight.dtype).removeprefix("torch."),
        block_length=length,
        steps=steps if found.estimator == "discrete" else None,
        card=None if card is None else Path(card),
        nats_per_predicted_token=_predicted(lm, found, len(text.windows_WT)),
        temperature=temperature,
    )
    if made.card is not None:
        made.save(made.card)
    return made


def _predicted(lm: LanguageModel, found: likelihood.Likelihood, windows: int) -> float | None:
    """Nats of a token that the network predicts; None where it predicts all of them."""
    if lm.is_diffusion or lm.config.start_token_id is not None:
        return None
    first = math.log(lm.config.network.vocab_size - 1)  # uniform, without the mask
    return (found.nats_per_token * found.tokens - windows * first) / (found.tokens - windows)


def _block_length(lm: LanguageModel, asked: int | None) -> int:
    """Of a model of block diffusion, else 0. InputError where one is asked for and there are no blocks."""
    if asked and not lm.is_causal:
        raise InputError(f"{lm.name} is no model of block diffusion: it has no block length to choose")
    return asked or (lm.config.network.block_length if lm.is_causal else 0)


def _at(temperature: float, predict: Callable[Inputs, Tensor]) -> Callable[Inputs, Tensor]:
    """The logits divided by a temperature."""

    def cooled(*args: Inputs.args, **options: Inputs.kwargs) -> Tensor:
        return predict(*args, **options) / temperature

    return predict if temperature == 1 else cooled


def _check_temperature(lm: LanguageModel, temperature: float) -> None:
    in_range(temperature, 0, 100, "the temperature", above=True)
    if temperature != 1 and lm.is_diffusion and (isinstance(lm.noise, ScoreNoise) or not isinstance(lm.noise, MaskedNoise)):
        raise InputError(f"{lm.name} is neither a masked model nor an autoregressive one: its bound is measured at temperature 1")


def _check_window(lm: LanguageModel, window: int | None) -> None:
    if window is not None and (lm.is_diffusion or not 2 <= window <= lm.window):
        why = "is a diffusion model, whose window is part of it" if lm.is_diffusion else f"reads 2 to {lm.window} tokens"
        raise InputError(f"window {window}: {lm.name} {why}")
