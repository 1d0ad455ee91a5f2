"""Write texts under a schedule and measure them: the same seeds for every schedule, so that differences show through the noise.

Shapes: N texts, T tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from torch import Tensor

from dlm.model_scheduling import routing
from dlm.model_scheduling.cost import CallCost, Metered
from dlm.model_scheduling.ledger import Ledger
from dlm.model_scheduling.outcome import Outcome
from dlm.protocols import Denoiser
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas

Figures = Callable[[Tensor], dict[str, Tensor]]
"""Texts (N, T) -> figures of each text (N,), by name; `bits` among them, less is better."""


@dataclass(frozen=True)
class Trial:
    """Call it with a schedule and a range of seeds. sampler: whose denoiser is put in; prompts: first tokens of the text of each seed.

    ledger: outcomes measured already under `settings`, the fingerprints of all weights among them; a trial found there is not run again.
    """

    sampler: DiffusionSampler
    denoisers: Mapping[str, Denoiser]
    prices: Mapping[str, CallCost]
    figures: Figures
    length: int
    mask_id: int
    settings: Mapping[str, object]
    device: str = "cpu"
    batch: int = 16
    prompts: Sequence[Sequence[int]] = ((),)
    ledger: Ledger | None = None

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
                self.ledger.add(self.settings, found)
        return found

    def _known(self, word: str, seeds: tuple[int, int]) -> Outcome | None:
        return None if self.ledger is None else self.ledger.find(self.settings, word, seeds)

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
