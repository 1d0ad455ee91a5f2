"""What a block of the backbone is made of: RMSNorm, rotary positions, attention with grouped queries, gated or squared-ReLU MLP.

Shapes: B batch, T positions of the window, Q queried positions, D width, H heads, G kv heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.models import attention
from dlm.models.cache import KVCache, RaggedCache, TextCache, WindowCache
from dlm.models.config import TransformerConfig

AnyCache = KVCache | RaggedCache | TextCache | WindowCache


def rotary(pos_BQ: Tensor, head_dim: int, base: float, scaling: tuple[float, ...] = ()) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, Q, K), float32, of RoPE (Su et al. 2104.09864), halves rotated as in Llama.

    scaling: (factor, low, high, window before) of Llama 3.1: what turns less than `low` times in the former window turns `factor`
    times slower, what turns more than `high` times as ever, and between them it goes over smoothly.
    """
    frequency_K = base ** (-torch.arange(0, head_dim, 2, device=pos_BQ.device, dtype=torch.float32) / head_dim)
    if scaling:
        factor, low, high, before = scaling
        kept_K = ((frequency_K * before / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency_K = frequency_K * (kept_K + (1 - kept_K) / factor)
    angle_BQK = pos_BQ[..., None].float() * frequency_K
    angle_BQK = torch.cat([angle_BQK, angle_BQK], -1)[:, None]
    return angle_BQK.cos(), angle_BQK.sin()


def rotate(x_BHQK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BHQK.chunk(2, -1)
    return x_BHQK * cos.to(x_BHQK.dtype) + torch.cat([-second, first], -1) * sin.to(x_BHQK.dtype)


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """A function of rows (..., D), called with exactly so many at a time, the last ones filled up; 0: with all at once.

    What a row becomes can then not depend on how many others there are, for no kernel sees that.
    """
    if not rows:
        return function(x)
    x_ND = x.flatten(0, -2)
    filled_ND = F.pad(x_ND, (0, 0, 0, -len(x_ND) % rows))
    y_NO = torch.cat([function(piece) for piece in torch.split(filled_ND, rows)])[: len(x_ND)]
    return y_NO.view(*x.shape[:-1], -1)


def version(tensors: Sequence[Tensor]) -> int:
    """Another number whenever one of them was changed in place; 0 for those of inference mode, which forbids that."""
    return sum(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def project(product: Callable[[Tensor], Tensor] | None, layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What each layer says of x; `product`, of `dlm.inference.fused`, is all of them at once. An adapter acts on its layer's part.

    A product knows no gradients: where those are recorded, the layers are asked one by one, if they still have weights.
    """
    if product is None or (torch.is_grad_enabled() and layers[0].weight is not None):
        return [layer(x) for layer in layers]
    y, adapted = product(x), [layer for layer in layers if hasattr(layer, "adapt")]
    if adapted and not torch.is_grad_enabled():
        y, adapted = cast(Any, adapted[0]).adapt_together(layers, product, x, y), []
    parts = torch.split(y, [cast(nn.Linear, layer).out_features for layer in layers], -1) if len(layers) > 1 else [y]
    return [cast(Any, layer).adapt(x, part) if layer in adapted else part for layer, part in zip(layers, parts, strict=True)]


class RMSNorm(nn.RMSNorm):
    """The gain follows the input's dtype: under autocast a float32 gain would keep torch from its fused kernel."""

    rows = 0  # of `in_pieces`

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(self._normed, x, self.rows)

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, None if self.weight is None else self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    steady = False  # whether what a query reads is summed in one order in every call

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.joined: nn.Module | None = None  # of `dlm.inference.fused`: q, k and v as one product
        self.product: nn.Module | None = None  # and that of `out`
        inner, kv_inner = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.out = nn.Linear(inner, config.width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def heads(self, x_BQD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, Q, K), keys and values (B, G, Q, K) of these positions."""
        parts = project(self.joined, (self.q, self.k, self.v), x_BQD)
        q, k, v = (part.view(*x_BQD.shape[:2], -1, self.config.head_dim).transpose(1, 2) for part in parts)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool) -> Tensor:
        """What the queries read of keys and values, (B, H, Q, K)."""
        if self.steady:
            return attention.attend_steadily(q, k, v, mask, is_causal)
        if isinstance(mask, tuple):  # ("flex", block length)
            return attention.attend_flex(q, k, v, self.config.attention, mask[1])
        return attention.attend(q, k, v, mask, is_causal, self.config.dropout if self.training else 0.0)

    def join(self, read_BHQK: Tensor) -> Tensor:
        """What the heads have read as one (B, Q, D)."""
        (y_BQD,) = project(self.product, (self.out,), read_BHQK.transpose(1, 2).flatten(2))
        return y_BQD


class MLP(nn.Module):
    rows = 0  # of `in_pieces`

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.joined: nn.Module | None = None  # of gate and up, as in `Attention`
        self.product: nn.Module | None = None  # of down
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False) if config.mlp == "swiglu" else None
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            (up,) = project(self.joined, (self.up,), x)
            hidden = F.relu(up).square()
        else:
            gate, up = project(self.joined, (self.gate, self.up), x)
            hidden = in_pieces(F.silu, gate, self.rows) * up
        (y,) = project(self.product, (self.down,), hidden)
        return y


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any, is_causal: bool, cache: AnyCache | None) -> Tensor:
        q, k, v = self.attention.heads(self.attention_norm(x), cos, sin)
        if cache is not None:
            k, v = cache.write(self.attention.layer, k, v)
        return self._after(x, self.attention.read(q, k, v, mask, is_causal))

    def over(self, x: Tensor, cos: Tensor, sin: Tensor, kept: tuple[Tensor, Tensor], slot_Q: Tensor, mask_B1QT: Tensor) -> Tensor:
        """As `forward` over the whole memory of a cache, keys and values (B, G, T, K), of which the new ones take these slots; what
        `dlm.inference.fused` compiles. mask: added to the scores."""
        q, *new = self.attention.heads(self.attention_norm(x), cos, sin)
        for kept_BGTK, new_BGQK in zip(kept, new, strict=True):
            kept_BGTK.index_copy_(2, slot_Q, new_BGQK)
        if x.shape[1] == 1 and x.device.type == "cpu" and not self.attention.steady:
            return self._after(x, attention.attend_alone(q, *kept, mask_B1QT))
        return self._after(x, self.attention.read(q, *kept, mask_B1QT, False))

    def _after(self, x: Tensor, read_BHQK: Tensor) -> Tensor:
        x = x + self.dropout(self.attention.join(read_BHQK))
        y: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return y


class TimeEmbedding(nn.Module):
    """Sinusoids of t through a linear layer that starts at zero: a fresh network ignores the time."""

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.features = features
        self.linear = nn.Linear(2 * features, width)

    def forward(self, t_B: Tensor) -> Tensor:
        frequency = torch.exp(torch.linspace(0, math.log(1000.0), self.features, device=t_B.device))
        angle = t_B.float()[:, None] * frequency
        y: Tensor = self.linear(torch.cat([angle.sin(), angle.cos()], -1).to(self.linear.weight.dtype))
        return y
