"""Write texts under a schedule and measure them: the same seeds for every schedule, so that differences show through the noise.

Shapes: N texts, T tokens each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.model_scheduling import routing
from dlm.model_scheduling.cost import CallCost, Metered, call_costs
from dlm.protocols import Denoiser
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas

Figures = Callable[[Tensor], dict[str, Tensor]]
"""Texts (N, T) -> what each is worth (N,), by name; `bits` among them, less is better."""


@dataclass(frozen=True)
class Outcome:
    """One schedule on some seeds: figures of every text, FLOPs and seconds of all, calls of a text by model, and the texts."""

    schedule: str
    seeds: tuple[int, int]
    figures: dict[str, list[float]]
    blocks: float
    head: float
    seconds: float
    calls: dict[str, float]
    tokens: list[list[int]] = field(default_factory=list, repr=False, compare=False)

    @property
    def texts(self) -> int:
        return self.seeds[1] - self.seeds[0]

    def __add__(self, other: Outcome) -> Outcome:
        """The same schedule on further seeds."""
        assert self.schedule == other.schedule
        assert self.seeds[1] == other.seeds[0]
        calls = {key: (self.calls[key] * self.texts + other.calls[key] * other.texts) / (self.texts + other.texts) for key in self.calls}
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("blocks", "head", "seconds")}
        figures = {name: values + other.figures[name] for name, values in self.figures.items()}
        seeds = self.seeds[0], other.seeds[1]
        return replace(self, seeds=seeds, figures=figures, calls=calls, tokens=self.tokens + other.tokens, **sums)

    def mean(self, name: str) -> tuple[float, float]:
        """(mean, half the width of its 95 % interval) over texts."""
        return _interval(torch.tensor(self.figures[name], dtype=torch.float64))

    def against(self, other: Outcome, name: str) -> tuple[float, float]:
        """(mean, half the width of its 95 % interval) of the paired difference to the same seeds under `other`."""
        count = min(self.texts, other.texts)
        mine, theirs = (torch.tensor(one.figures[name][:count], dtype=torch.float64) for one in (self, other))
        return _interval(mine - theirs)

    def saved(self, other: Outcome) -> float:
        """Share of the FLOPs of `other`'s blocks, in calls that happened, for each text."""
        return 1 - self.blocks / self.texts / (other.blocks / other.texts)


def _interval(values_N: Tensor) -> tuple[float, float]:
    width = 1.96 * float(values_N.std()) / math.sqrt(len(values_N)) if len(values_N) > 1 else math.nan
    return float(values_N.mean()), width


@dataclass(frozen=True)
class Trial:
    """Call it with a schedule and a range of seeds. sampler: whose denoiser is put in; prompts: what the text of each seed begins with.

    ledger: a file of what is measured already under `settings`, the fingerprints of all weights among them; a trial found there is not
    run again.
    """

    sampler: DiffusionSampler
    denoisers: Mapping[str, Denoiser]
    prices: Mapping[str, CallCost]
    figures: Figures
    length: int
    mask_id: int
    settings: Mapping[str, Any]
    device: str = "cpu"
    batch: int = 16
    prompts: Sequence[Sequence[int]] = ((),)
    ledger: Path | None = None

    @classmethod
    def of(
        cls,
        lm: Any,
        light: str | Mapping[str, str],
        figures: Figures,
        *,
        sampler: str = "ancestral",
        steps: int,
        temperature: float = 1.0,
        judge: str = "",
        judge_weights: str = "",
        prompts: Sequence[Sequence[int]] = ((),),
        ledger: Path | None = None,
    ) -> Trial:
        """Of a `LanguageModel` as H and others by name, texts a window long. judge_weights: fingerprint of the judge. InputError as
        `LanguageModel.denoisers`."""
        networks = lm.denoisers(light)
        settings = {"heavy": lm.name, "light": light, "sampler": sampler, "steps": steps, "temperature": temperature, "judge": judge}
        settings |= {"prompted": len(prompts[0]), "prompts": len(prompts)}
        if ledger is not None:  # a model that was trained again keeps its name
            settings["weights"] = lm.fingerprints(light) | {"judge": judge_weights}
        made = lm.sampler(sampler=sampler, steps=steps, temperature=temperature)
        if not isinstance(made, DiffusionSampler):
            raise InputError(f"the sampler {sampler!r} has no steps to schedule: take ancestral, first-hitting, topk ...")
        return cls(
            made,
            networks,
            call_costs(networks, lm.window),
            figures,
            lm.window,
            lm.tokenizer.mask_id,
            settings,
            device=str(lm.network.device),
            prompts=prompts,
            ledger=ledger,
        )

    def __call__(self, word: str, first: int, last: int) -> Outcome:
        """Measured in batches, each kept in the ledger as soon as it is done."""
        whole = self._known(word, (first, last))
        if whole is not None:
            return whole
        parts = [self._part(word, begin, min(begin + self.batch, last)) for begin in range(first, last, self.batch)]
        return reduce(Outcome.__add__, parts)

    def _part(self, word: str, first: int, last: int) -> Outcome:
        found = self._known(word, (first, last))
        if found is None:
            found = self._run(word, first, last)
            if self.ledger is not None:
                with self.ledger.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"settings": dict(self.settings)} | asdict(found)) + "\n")
        return found

    def _known(self, word: str, seeds: tuple[int, int]) -> Outcome | None:
        if self.ledger is None or not self.ledger.is_file():
            return None
        for line in self.ledger.read_text(encoding="utf-8").splitlines():
            try:
                data = json.loads(line)
            except json.JSONDecodeError:  # half a line of a search that was killed
                continue
            same = data.pop("settings", None) == json.loads(json.dumps(dict(self.settings)))
            if same and data["schedule"] == word and tuple(data["seeds"]) == seeds:
                return Outcome(**(data | {"seeds": seeds}))
        return None

    def _run(self, word: str, first: int, last: int) -> Outcome:
        meters = {key: Metered(denoiser, self.prices[key]) for key, denoiser in self.denoisers.items()}
        router = routing.make(word, meters, self.sampler.budget)
        prompts = [self.prompts[seed % len(self.prompts)] for seed in range(first, last)]
        canvas = Canvas.from_rows([[*prompt, *[None] * (self.length - len(prompt))] for prompt in prompts], fill=self.mask_id)
        tokens_NT = canvas.tokens_BT
        for frame in replace(self.sampler, denoiser=router).steps(canvas.to(self.device), rng=generators(first, last - first)):
            tokens_NT = frame.tokens_BT
        figures = {name: values_N.tolist() for name, values_N in self.figures(tokens_NT).items()}
        sums = {name: sum(getattr(meter, name) for meter in meters.values()) for name in ("blocks", "head", "seconds")}
        calls = {key: meter.rows / (last - first) for key, meter in meters.items()}
        return Outcome(word, (first, last), figures, calls=calls, tokens=tokens_NT.tolist(), **sums)
