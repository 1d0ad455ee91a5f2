"""The curse of parallel decoding: the bits per character lost when several tokens are drawn in one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.evaluation import order_cost, parallel_decoding
from dlm.evaluation.statistics import Curve, Mean
from dlm.language_model import LanguageModel
from dlm.sampling import registry
from dlm.sampling.diffusion.protocols import Rule
from dlm.sampling.draw import Draw
from dlm.workflows.inputs import FORMAT, Counter, Model, Progress, Text, language_model, masked_noise, silent, told

DEFAULT_SIZES = (1, 4, 16, 64)  # tokens a step
CPU_WINDOWS, GPU_WINDOWS = 4, 64  # of one batch


@dataclass(frozen=True)
class StepCost:
    """Bits per character lost with so many tokens a step. equal, best, text: random positions priced by the curve, in equal steps, in the
    best steps, and in equal steps by the cross-entropy on the text; measured: by sampler."""

    tokens_per_step: int
    steps: int
    equal: Mean
    best: Mean
    text: Mean
    measured: Mapping[str, Mean]

    def record(self) -> dict[str, object]:
        priced = {name: getattr(self, name).record() for name in ("equal", "best", "text")}
        measured = {word: mean.record() for word, mean in self.measured.items()}
        return {"tokens_per_step": self.tokens_per_step, "steps": self.steps} | priced | {"measured": measured}


@dataclass(frozen=True)
class CurseReport:
    """characters_per_token: of the text; bound: bits per character of the text, at most; best_steps: sizes of the fewest steps measured.

    known, entropy, text: the curve, bits per character of a masked token when so many others are visible.
    """

    model: str
    data: str
    split: str
    windows: int
    window: int
    seed: int
    characters_per_token: float
    bound: Mean
    rows: tuple[StepCost, ...]
    best_steps: tuple[int, ...]
    known: tuple[int, ...]
    entropy: Curve
    text: Curve

    def levels(self) -> dict[str, object]:
        """The curve as JSON."""
        return {"known": list(self.known), "entropy": self.entropy.record(), "text": self.text.record()}

    def record(self) -> dict[str, object]:
        """As `dlm curse --json` prints it."""
        names = ("model", "data", "split", "windows", "window", "seed", "characters_per_token")
        facts: dict[str, object] = {"format": FORMAT} | {name: getattr(self, name) for name in names}
        found = {"bound": self.bound.record(), "rows": [row.record() for row in self.rows], "best_steps": list(self.best_steps)}
        return facts | found | {"curve": self.levels()}


@told
def curse(
    model: Model,
    data: str | Path | None = None,
    *,
    split: str = "val",
    val_fraction: float = 0.1,
    samplers: Sequence[str] = ("ancestral", "topk"),
    tokens_per_step: Sequence[int] | None = None,
    max_windows: int = 8,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> CurseReport:
    """Price every number of tokens a step by one curve, and measure the samplers at those of `tokens_per_step`.

    model: a bidirectional masked diffusion model; data: by default the text that it was trained on; tokens_per_step: by default those of
    1, 4, 16, 64 that the window holds. progress counts windows read. InputError for another model, a sampler that does not write each
    token once, sizes outside the window, or fewer than two windows of text.
    """
    lm = language_model(model, device)
    noise = masked_noise(lm, "the price of parallel decoding is counted in masks")
    if lm.is_causal:
        raise InputError(f"{lm.name} is a model of block diffusion: it never sees random known tokens")
    sizes = _sizes(tokens_per_step, lm.window)
    rules = {word: registry.make(word, Draw(), lm.noise) for word in samplers}
    for rule in rules.values():
        parallel_decoding.check(rule)
    text = Text.read(lm, data, split=split, val_fraction=val_fraction, max_windows=max_windows)
    windows = len(text.windows_WT)
    if windows < 2:
        raise InputError(f"the spread over windows is the error: give 2 windows of {lm.window} tokens at least, here are {windows}")
    count = Counter(progress, order_cost.curve_rows(windows, lm.window) + len(rules) * len(sizes) * windows)
    curve = order_cost.entropy_curve(noise, lm.predict, text.windows_WT, seed=seed, progress=count.add)
    characters = text.characters / text.windows_WT.numel()
    measured = _measured(lm, text.windows_WT, rules, sizes, characters, seed, count)
    bits = 1 / (characters * math.log(2))
    entropy_WT, text_WT = curve.every(curve.entropy_WK) * bits, curve.every(curve.text_WK) * bits
    powers = {2**k for k in range(sizes[-1].bit_length())}  # the curve prices these at no cost
    best = order_cost.best_steps(order_cost.smooth(entropy_WT.mean(0)), -(-lm.window // sizes[-1]))
    return CurseReport(
        model=lm.name,
        data=text.source,
        split=split,
        windows=windows,
        window=lm.window,
        seed=seed,
        characters_per_token=characters,
        bound=Mean.of(text_WT.mean(-1)),
        rows=tuple(_step_cost(size, entropy_WT, text_WT, measured.get(size, {})) for size in sorted(powers | set(sizes))),
        best_steps=tuple(best),
        known=tuple(curve.known_K.tolist()),
        entropy=Curve.of(curve.entropy_WK * bits),
        text=Curve.of(curve.text_WK * bits),
    )


def _sizes(asked: Sequence[int] | None, window: int) -> list[int]:
    """Ascending, each once. InputError for one that the window does not hold."""
    if asked is None:
        return [size for size in DEFAULT_SIZES if size <= window]
    sizes = sorted(set(asked))
    if not sizes or not 1 <= sizes[0] <= sizes[-1] <= window:
        raise InputError(f"tokens per step lie in 1 .. {window}, the window of this model; got {', '.join(map(str, asked)) or 'none'}")
    return sizes


@torch.no_grad()
def _measured(
    lm: LanguageModel, windows_WT: Tensor, rules: Mapping[str, Rule], sizes: Sequence[int], characters: float, seed: int, count: Counter
) -> dict[int, dict[str, Mean]]:
    """Bits per character that each sampler loses, by tokens a step."""
    batch = CPU_WINDOWS if windows_WT.device.type == "cpu" else GPU_WINDOWS
    found: dict[int, dict[str, Mean]] = {size: {} for size in sizes}
    for word, rule in rules.items():
        for size in sizes:
            one = parallel_decoding.curse(lm.noise, lm.predict, windows_WT, rule, size, seed=seed, batch=batch, progress=count.add)
            found[size][word] = one.bits_per_char(characters)
    return found


def _step_cost(size: int, entropy_WT: Tensor, text_WT: Tensor, measured: Mapping[str, Mean]) -> StepCost:
    window = entropy_WT.shape[1]
    steps = -(-window // size)
    equal = order_cost.equal_steps(window, steps)
    prices = order_cost.price(entropy_WT, equal), order_cost.best_price(entropy_WT, steps), order_cost.price(text_WT, equal)
    means = [Mean.of(price_W / window) for price_W in prices]
    return StepCost(size, steps, means[0], means[1], means[2], measured)
