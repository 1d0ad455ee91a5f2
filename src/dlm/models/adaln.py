"""A transformer whose norms are shifted, scaled and gated by the noise level (adaLN): the network of MDLM, BD3-LM, SEDD, DUO and GIDD.

DiT's block (Peebles and Xie 2212.09748) for text, as in SEDD (Lou et al. 2310.16834, `model/transformer.py`): LayerNorm without bias,
rotary positions, GELU. Attention, masks and caches are those of `Transformer`.
Shapes: B batch, T positions of the window, Q queried positions, V vocabulary, D width, C width of the noise level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.models.block import MLP, AnyCache, Attention, Block, Blocks, Embedding, ForwardPass, Head, Linear, Rotary
from dlm.models.cache import KVCache, RaggedCache
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer

LEVELS = ("none", "sigma", "time")
FEATURES = 256  # sinusoids of the noise level


@dataclass(frozen=True)
class AdaLNConfig(TransformerConfig):
    """level: the number that the network is told, `none` (a constant 0), `time`, or `sigma` = -log(1 - (1 - level_eps) t).

    scores: the output is SEDD's log score, log p(y instead of z_i) / p(z_i), scaled by the noise level and 0 at the token that stands.
    """

    MLPS: ClassVar[tuple[str, ...]] = ("gelu",)
    mlp: str = "gelu"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    level: str = "none"
    level_width: int = 128
    level_eps: float = 1e-3
    scores: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in LEVELS:
            raise ValueError(f"unknown level {self.level!r}; known: {', '.join(LEVELS)}")
        if self.groups:
            raise ValueError("this network has no embeddings of groups: leave groups away")
        if self.scores and self.level != "sigma":
            raise ValueError(f"scores are scaled by sigma: the level must be sigma, got {self.level}")
        if self.level_width < 1 or not 0 < self.level_eps < 1:
            raise ValueError(f"level_width must be at least 1 and level_eps within 0 .. 1, got {self.level_width}, {self.level_eps}")
        object.__setattr__(self, "time_conditioning", self.level != "none")


class LayerNorm(nn.LayerNorm):
    """Without bias, in float32."""

    def __init__(self, config: AdaLNConfig) -> None:
        super().__init__(config.width, eps=config.norm_eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), None, self.eps).to(x.dtype)


class NoiseLevel(nn.Module):
    """Sinusoids of the noise level, cosines first, through two layers: (B,) -> (B, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, width)
        self.outer = nn.Linear(width, width)

    def forward(self, level_B: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10_000) * torch.arange(FEATURES // 2, device=level_B.device) / (FEATURES // 2))
        angle = level_B.float()[:, None] * frequency
        wave = torch.cat([angle.cos(), angle.sin()], -1).to(self.inner.weight.dtype)
        return F.silu(self.outer(F.silu(self.inner(wave))))


class GELUMLP(MLP):
    """down(gelu(up x)), the tanh form of GELU, with biases."""

    def __init__(self, config: AdaLNConfig) -> None:
        nn.Module.__init__(self)
        self.gate = None
        self.up = Linear(config.width, config.mlp_width)
        self.down = Linear(config.mlp_width, config.width)
        self.ungated = nn.GELU(approximate="tanh")


def modulate(x_BQD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return x_BQD * (1 + scale_B1D) + shift_B1D


class AdaLNBlock(Block):
    """x + gate * attention(modulated norm(x)), then the same with the MLP; shifts, scales and gates are linear in the noise level."""

    def __init__(self, config: AdaLNConfig, layer: int) -> None:
        nn.Module.__init__(self)
        self.attention_norm = LayerNorm(config)
        self.conv = None
        self.attention = Attention(config, layer)
        self.mlp_norm = LayerNorm(config)
        self.mlp = GELUMLP(config)
        self.modulation = nn.Linear(config.level_width, 6 * config.width)

    def forward(self, x: Tensor, forward_pass: ForwardPass) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(forward_pass.level)[:, None].chunk(6, -1)
        x = x + gate * self.attention(modulate(self.attention_norm(x), shift, scale), forward_pass)
        y: Tensor = x + mlp_gate * self.mlp(modulate(self.mlp_norm(x), mlp_shift, mlp_scale), forward_pass.mask_tokens)
        return y


class AdaLN(Transformer):
    """A `Denoiser` that is told the noise level. A view by `dlm.models.pattern.reading` reads it under another attention pattern."""

    config: AdaLNConfig

    def __init__(self, config: AdaLNConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.time = None
        self.level = NoiseLevel(config.level_width)
        self.rotary = Rotary(config)
        self.blocks = Blocks(AdaLNBlock(config, layer) for layer in range(config.layers))
        self.out_norm = LayerNorm(config)
        self.out_modulation = nn.Linear(config.level_width, 2 * config.width)
        self.head = Head(config.width, config.vocab_size)
        self.reset()

    def forward(
        self,
        z_BQ: Tensor,
        t_B: Tensor | None = None,
        *,
        pos_BQ: Tensor | None = None,
        valid_BT: Tensor | None = None,
        cache: AnyCache | None = None,
        pattern: str = "",
        block_length: int = 0,
        phase_B: Tensor | None = None,
        begin_B1: Tensor | None = None,
        own_BQQ: Tensor | None = None,
        at_BQ: Tensor | None = None,
        index_BC: Tensor | None = None,
        mixed_BQV: Tensor | None = None,
        logits: bool = True,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """As of `Transformer.forward`; t_B is turned into the level that the network is told."""
        attends = self._attends(z_BQ, pos_BQ, valid_BT, cache, pattern, block_length, phase_B, begin_B1, own_BQQ)
        pos_BQ, mask, is_causal, _ = attends
        level_B = self.told(t_B, len(z_BQ))
        level_BC, x_BQD = self.level(level_B), self.embed(z_BQ) if mixed_BQV is None else self.mix(mixed_BQV)
        cos, sin = self.rotary(pos_BQ)
        x_BQD = self.blocks(x_BQD, ForwardPass(cos, sin, mask, is_causal, cache, level=level_BC))
        if isinstance(cache, KVCache | RaggedCache):
            cache.advance(z_BQ.shape[1])
        if pattern == "clean":
            x_BQD, z_BQ = (x[:, : x.shape[1] // 2] for x in (x_BQD, z_BQ))
        shift_B1D, scale_B1D = self.out_modulation(level_BC)[:, None].chunk(2, -1)
        hidden_BQD = modulate(self.out_norm(x_BQD), shift_B1D, scale_B1D)
        if not logits:
            return hidden_BQD
        if states is not None:
            states.append(hidden_BQD)
        if index_BC is not None:
            hidden_BQD, at_BQ = hidden_BQD.gather(1, index_BC[..., None].expand(-1, -1, hidden_BQD.shape[-1])), None
            z_BQ = z_BQ.gather(1, index_BC)
        logits_BQV = self._read_at(hidden_BQD, at_BQ)
        return self._scores(logits_BQV, z_BQ, level_B) if self.config.scores else logits_BQV

    def told(self, t_B: Tensor | None, rows: int) -> Tensor:
        """The level of each row (B,). ValueError without a time where the network reads it."""
        if self.config.level == "none":
            return torch.zeros(rows, device=self.device)
        if t_B is None:
            raise ValueError("this network is conditioned on time: give t_B")
        t_B = t_B.to(self.device)
        return t_B if self.config.level == "time" else -torch.log1p(-(1 - self.config.level_eps) * t_B)

    def _read_at(self, hidden_BQD: Tensor, at_BQ: Tensor | None) -> Tensor:
        if at_BQ is None:
            return self.read_out(hidden_BQD)
        logits_MV = self.read_out(hidden_BQD[at_BQ])
        return logits_MV.new_zeros(*at_BQ.shape, logits_MV.shape[-1]).index_put_((at_BQ,), logits_MV)

    def _scores(self, logits_BQV: Tensor, z_BQ: Tensor, sigma_B: Tensor) -> Tensor:
        """Less log (e^sigma - 1) and log (V - 1), and 0 at the token that stands (SEDD `model/transformer.py`, `scale_by_sigma`)."""
        scale_B = torch.expm1(sigma_B).log() + math.log(self.config.vocab_size - 1)
        return (logits_BQV - scale_B.to(logits_BQV.dtype)[:, None, None]).scatter(-1, z_BQ[..., None], 0.0)
