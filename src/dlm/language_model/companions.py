"""The models that work beside one: draft models, the light models of a schedule, and its own quantized copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from dlm.adapters.lora import fingerprint
from dlm.errors import InputError
from dlm.inference import quantize
from dlm.language_model.protocols import Model
from dlm.model_scheduling import plan
from dlm.models.transformer import Transformer

M = TypeVar("M", bound=Model)


class Companions(Generic[M]):
    """Each is loaded or made once. load: a model by its name, or by its directory beside the checkpoint."""

    def __init__(self, load: Callable[[str], M]) -> None:
        self._load = load
        self._models: dict[str, M] = {}
        self._quantized: dict[str, Transformer] = {}

    def get(self, name: str) -> M:
        """InputError where there is no such model."""
        if name not in self._models:
            self._models[name] = self._load(name)
        return self._models[name]

    def introduce(self, other: M, name: str) -> None:
        """Have `get` give this model for a name, instead of loading it once more."""
        self._models[name] = other

    def quantized(self, network: Transformer, dtype: str) -> Transformer:
        """The network with its weights quantized to `int8` or `int4`; the embedding is held once."""
        if dtype not in self._quantized:
            self._quantized[dtype] = quantize.quantized_copy(network, quantize.BITS[dtype])
        return self._quantized[dtype]


def denoisers(model: Model, light: str | Mapping[str, str], get: Callable[[str], Model]) -> dict[str, Transformer]:
    """The network of a model as H beside the light ones. InputError for a model of another vocabulary, window or noise."""
    names = {plan.LIGHT: light} if isinstance(light, str) else dict(light)
    if plan.HEAVY in names:
        raise InputError(f"{plan.HEAVY} is {model.name} itself: the other models have other letters")
    for name in names.values():
        other = get(name)
        if not other.is_diffusion or other.is_causal or other.config.noise != model.config.noise:
            raise InputError(f"{name} is no bidirectional diffusion model with the noise of {model.name}: it cannot take its steps")
        if other.tokenizer.fingerprint() != model.tokenizer.fingerprint() or other.window != model.window:
            raise InputError(f"{name} has another vocabulary or window than {model.name}: it cannot take its steps")
    return {plan.HEAVY: model.network} | {key: get(name).network for key, name in names.items()}


def fingerprints(networks: Mapping[str, Transformer]) -> dict[str, str]:
    """Of their weights by key, 16 hex digits each."""
    return {key: fingerprint(network)[:16] for key, network in networks.items()}
