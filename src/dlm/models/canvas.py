"""A network of transformers that reads text causally and denoises a canvas after it: DiffusionGemma's class, called as it is.

Shapes: B batch, N text, C canvas, V vocabulary; the id V is a mask of ours, which the network never sees or predicts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.models.config import TransformerConfig
from dlm.models.wrapped import WrappedNetwork


class CanvasNetwork(WrappedNetwork):
    """`inner` is a DiffusionGemmaForBlockDiffusion; `config` describes it. temperatures: of the last step and before the first."""

    def __init__(self, inner: Any, config: TransformerConfig, temperatures: tuple[float, float]) -> None:
        super().__init__(inner, config)
        self.temperatures = temperatures
        self.length: int = inner.config.canvas_length

    def forward(self, z_BQ: Tensor, t_B: Tensor | None = None, **_how: Any) -> Tensor:
        """The logits (B, C, V) of the last C tokens as a canvas beside the text before them, untempered and not conditioned."""
        text = ReadText(self)
        text.add(z_BQ[:, : -self.length])
        return text.logits(z_BQ[:, -self.length :])


class ReadText:
    """The keys and values of a text, and the canvases after it."""

    def __init__(self, network: CanvasNetwork) -> None:
        from transformers import DynamicCache

        self.network = network
        self.cache = DynamicCache(config=network.inner.config.get_text_config(decoder=True))

    @torch.no_grad()
    def add(self, text_BN: Tensor) -> None:
        """Read on."""
        self.network.inner.model.encoder(input_ids=text_BN, past_key_values=self.cache)

    @torch.no_grad()
    def logits(self, z_BC: Tensor, last_BCV: Tensor | None = None) -> Tensor:
        """last_BCV: logits of the step before, by which the network is conditioned."""
        found: Tensor = self.network.inner(decoder_input_ids=z_BC, past_key_values=self.cache, self_conditioning_logits=last_BCV).logits
        return found

    def canvas(self) -> Conditioned:
        """A denoiser of the next canvas, from its first step on."""
        return Conditioned(self)


class Conditioned:
    """A `Denoiser` of one canvas. Its logits are those at the temperature of the noise level, and condition its next call."""

    def __init__(self, text: ReadText) -> None:
        self.text, self.last_BCV = text, None  # type: ReadText, Tensor | None

    def __call__(self, z_BC: Tensor, t_B: Tensor | None = None, **_how: Any) -> Tensor:
        """Logits (B, C, V + 1)."""
        assert t_B is not None
        low, high = self.text.network.temperatures
        temperature_B = low + (high - low) * t_B.float()
        self.last_BCV = self.text.logits(z_BC, self.last_BCV) / temperature_B[:, None, None]
        return F.pad(self.last_BCV, (0, 1), value=-torch.inf)
