"""The parts of a language model that its samplers are built from: signatures only, so that no file needs the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from dlm.adapters.medusa import Heads
from dlm.formats.native import ModelConfig
from dlm.models.transformer import Transformer
from dlm.noise.process import Process
from dlm.protocols import Denoiser
from dlm.sampling.autoregressive.draft import Draft
from dlm.sampling.autoregressive.draft_length import AdaptiveDraftLength
from dlm.text.tokenizer import Tokenizer


class Model(Protocol):
    """The interface of a `dlm.LanguageModel` for its samplers and for other models."""

    network: Transformer
    config: ModelConfig
    tokenizer: Tokenizer
    noise: Process
    name: str
    defaults: dict[str, Any]
    heads: Heads | None
    draft_lengths: dict[tuple[Draft, bool], AdaptiveDraftLength]
    """The learned lengths of adaptive drafts, by draft, with and without an adapter."""
    pass_seconds: dict[tuple[int, bool], float]
    """Measured seconds of a forward pass, by its positions, with and without an adapter."""

    @property
    def is_diffusion(self) -> bool: ...

    @property
    def is_causal(self) -> bool: ...

    @property
    def window(self) -> int: ...

    @property
    def stops(self) -> frozenset[int]: ...

    @property
    def denoiser(self) -> Denoiser: ...

    def other(self, name: str) -> Model: ...

    def quantized(self, dtype: str) -> Transformer: ...

    def denoisers(self, light: str | Mapping[str, str]) -> Mapping[str, Denoiser]: ...
