"""A heavy model and the lighter ones that may take its denoising steps: their networks, FLOPs, KL and trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dlm.errors import InputError
from dlm.evaluation import order_cost
from dlm.language_model import LanguageModel
from dlm.model_scheduling.cost import CallCost, call_costs
from dlm.model_scheduling.ledger import Ledger
from dlm.model_scheduling.plan import LIGHT
from dlm.model_scheduling.search import Price
from dlm.model_scheduling.sensitivity import on_text, predictors
from dlm.model_scheduling.trial import Figures, Trial
from dlm.models.transformer import Transformer
from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.workflows.inputs import Counter, Model, judge_figures, language_model, masked_noise, weights

Light = Model | Mapping[str, Model]
"""The model L, or several by capital letters."""


@dataclass(frozen=True)
class ModelPair:
    """lm: the heavy model H; light: names of the others by key; networks, prices: of all by key."""

    lm: LanguageModel
    light: dict[str, str]
    networks: dict[str, Transformer]
    prices: dict[str, CallCost]

    @classmethod
    def of(cls, heavy: Model, light: Light, device: str = "cpu") -> ModelPair:
        """InputError for a model without denoising steps, or of another vocabulary, window or noise than H."""
        lm = language_model(heavy, device)
        if not lm.is_diffusion or lm.is_causal:
            raise InputError(f"{lm.name} is no bidirectional diffusion model: it has no denoising steps to schedule")
        named = light if isinstance(light, Mapping) else {LIGHT: light}
        for one in named.values():
            if isinstance(one, LanguageModel):
                lm.introduce(one)
        names = {key: one.name if isinstance(one, LanguageModel) else str(one) for key, one in named.items()}
        networks = lm.denoisers(names)
        return cls(lm, names, networks, call_costs(networks, lm.window))

    @property
    def words(self) -> str:
        """The lighter models as the command line takes them."""
        return self.light[LIGHT] if set(self.light) == {LIGHT} else ",".join(f"{key}={name}" for key, name in self.light.items())

    @property
    def blocks(self) -> dict[str, float]:
        """FLOPs of the blocks of one forward pass, by key."""
        return {key: one.blocks for key, one in self.prices.items()}

    @property
    def noise(self) -> MaskedNoise:
        """InputError for other noise."""
        return masked_noise(self.lm, "steps are compared by their masks")

    def kl(self, windows_WT: Tensor, segments: int, seed: int, count: Counter) -> dict[str, list[float]]:
        """KL(H || model) by key and segment, nats per masked token, on noised text."""
        found = on_text(self.noise, predictors(self.networks), windows_WT, segments=segments, seed=seed, progress=count.add)
        return found.kl()

    def price(self, windows_WT: Tensor, count: Counter) -> Price:
        """Nats a text that a number of steps loses by drawing tokens at once, by H's entropies."""
        return order_cost.ancestral_prices(self.noise, self.lm.predict, windows_WT, progress=count.add)


class Trials:
    """Trials of a pair by number of steps, each made once. The judge and the ledger are read once for all.

    prompts: tokens that the text of each seed begins with. InputError for a sampler without steps, and as `judge_figures`.
    """

    def __init__(
        self,
        pair: ModelPair,
        judge: Model,
        *,
        sampler: str = "ancestral",
        temperature: float = 1.0,
        prompts: Sequence[Sequence[int]] = ((),),
        ledger: Path | None = None,
    ) -> None:
        self.pair, self.sampler, self.temperature, self.prompts = pair, sampler, temperature, prompts
        self.figures: Figures = judge_figures(judge, pair.lm, len(prompts[0]))
        self.ledger = None if ledger is None else Ledger(ledger)
        self.settings: dict[str, object] = {
            "heavy": pair.lm.name,
            "light": pair.light[LIGHT] if set(pair.light) == {LIGHT} else pair.light,
            "sampler": sampler,
            "temperature": temperature,
            "judge": judge.name if isinstance(judge, LanguageModel) else str(judge),
            "prompted": len(prompts[0]),
            "prompts": len(prompts),
        }
        if ledger is not None:  # a model that was trained again keeps its name
            self.settings["weights"] = pair.lm.fingerprints(pair.light) | {"judge": weights(judge)}
        self._made: dict[int, Trial] = {}

    def __call__(self, steps: int) -> Trial:
        """Of texts a window long in so many steps."""
        if steps not in self._made:
            self._made[steps] = self._trial(steps)
        return self._made[steps]

    def _trial(self, steps: int) -> Trial:
        lm = self.pair.lm
        sampler = lm.sampler(sampler=self.sampler, steps=steps, temperature=self.temperature)
        if not isinstance(sampler, DiffusionSampler):
            raise InputError(f"the sampler {self.sampler!r} has no steps to schedule: take ancestral, first-hitting, topk ...")
        return Trial(
            sampler=sampler,
            denoisers=self.pair.networks,
            prices=self.pair.prices,
            figures=self.figures,
            length=lm.window,
            mask_id=lm.tokenizer.mask_id,
            settings=self.settings | {"steps": steps},
            device=str(lm.network.device),
            prompts=self.prompts,
            ledger=self.ledger,
        )
