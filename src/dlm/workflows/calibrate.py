"""Every sampler of a masked model measured side by side: the table behind `--sampler auto`."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch import Tensor

from dlm.calibration import measure
from dlm.calibration.partial import Partial
from dlm.calibration.table import Calibration, Options, Row
from dlm.errors import InputError
from dlm.evaluation.card import device_name
from dlm.evaluation.statistics import Mean
from dlm.language_model import LanguageModel
from dlm.model_scheduling.trial import Figures
from dlm.sampling import windows
from dlm.workflows.inputs import Counter, Model, Progress, judge_figures, language_model, masked_noise, silent, told, weights

FOREIGN_LENGTH = 128  # tokens of a text of a model that was not trained on full windows, which may be very long


@told
def calibrate(
    model: Model,
    judge: Model = "shakespeare-ar",
    *,
    samples: int = 8,
    length: int = 0,
    temperature: float = 1.0,
    quick: bool = False,
    retime: bool = False,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Calibration:
    """Forward passes, seconds, bits under a judge and diversity of every sampler of a masked model, with the same seeds.

    judge: an autoregressive model, of the same vocabulary or one that reads the text; samples: texts for each setting. length: of a text,
    0: a window, of another project's model at most 128 tokens. quick: three settings only.
    retime: measure only the seconds of the table that is there already, in turns. out: directory that the table is written to; for
    `--sampler auto` that of the checkpoint. A measurement into `out` that was stopped goes on there. progress counts settings.
    InputError for other noise, a judge that cannot read the texts, or one text.
    """
    if samples < 2:
        raise InputError(f"--samples must be at least 2, to have an error, got {samples}")
    lm = language_model(model, device)
    masked_noise(lm, "there is nothing to calibrate")
    length = length or (lm.window if lm.config.fills_window else min(lm.window, FOREIGN_LENGTH))
    figures, named = judge_figures(judge, lm), judge.name if isinstance(judge, LanguageModel) else str(judge)
    if out is not None:
        _prepare(Path(out))
    where = {"device": device_name(lm.network.device)}
    if retime:
        found = lm.calibration()
        count = Counter(progress, measure.ROUNDS * len(found.rows))
        rows = measure.retime(pace(lm, samples, length, temperature, seed), found.rows, progress=count.add)
        made = found.made | where
    else:
        made = {"model": lm.name, "judge": named, "texts": samples, "length": length, "temperature": temperature, "seed": seed}
        made |= where
        settings = measure.candidates(window=length, causal=lm.is_causal, blocks=block_lengths(lm, length), quick=quick)
        kept = None if out is None else Partial(Path(out), {**made, "weights": [weights(lm), weights(judge)]})
        one = partial(measure.measure, writing(lm, samples, length, temperature), judging(figures), seed=seed)
        rows = _rows(settings, one, kept, Counter(progress, len(settings)))
    table = Calibration(rows, made)
    if out is not None:
        table.save(Path(out))
        Partial.delete(Path(out))
    return table


def _rows(settings: list[Options], one: Callable[[Options], Row], kept: Partial | None, count: Counter) -> list[Row]:
    """Those that `one` makes, and those that a stopped measurement left."""
    rows: list[Row] = []
    try:
        for setting in settings:
            rows.append(one(setting) if kept is None else kept.row(setting, one))
            count.add()
    except KeyboardInterrupt:
        if kept is None:
            raise
        raise KeyboardInterrupt(f"stopped, {len(rows)} of {len(settings)} settings are kept; the same command goes on") from None
    return rows


def block_lengths(lm: LanguageModel, length: int) -> list[int]:
    """Lengths of blocks, the shortest first, in which the exact sampler may write a text besides the model's own order.

    A bidirectional network reads any; block diffusion those that it learned.
    """
    if not lm.is_causal:
        return sorted({1, windows.longest_block(length, max(1, length // 16))})
    learned = lm.config.training.get("block_lengths")
    own = lm.network.config.block_length
    return sorted({n for n in learned if isinstance(n, int) and 0 < n < own and own % n == 0}) if isinstance(learned, list) else []


def _prepare(out: Path) -> None:
    """Make the directory, before the work and not after it."""
    with suppress(OSError):
        out.mkdir(parents=True, exist_ok=True)
    if not (out.is_dir() and os.access(out, os.W_OK)):
        raise InputError(f"{out} is no directory that can be written: name another one (--out)")


def writing(lm: LanguageModel, samples: int, length: int, temperature: float) -> measure.Generate:
    """The model writes so many texts of `length` tokens."""

    def generate(options: Options, seed: int) -> tuple[Tensor, float, float]:
        results = lm.generate([""] * samples, length=length, seed=seed, temperature=temperature, **options)
        return results[0].trajectory.current_BT, results[0].forwards, results[0].seconds

    return generate


def judging(figures: Figures) -> measure.Judge:
    """Bits per token under an autoregressive model."""

    def judge(samples_NT: Tensor) -> Mean:
        return Mean.of(figures(samples_NT)["bits"])

    return judge


def pace(lm: LanguageModel, samples: int, length: int, temperature: float, seed: int) -> measure.Pace:
    """Seconds of the first forward passes, for each text."""

    def seconds(options: Options, calls: int) -> float:
        frames = lm.stream([""] * samples, length=length, seed=seed, temperature=temperature, **options)
        clock = time.perf_counter()
        done = sum(1 for _ in itertools.islice(frames, calls))
        return (time.perf_counter() - clock) / done / samples

    return seconds
