"""The parts of the backbone: RMSNorm, rotary positions, attention with grouped queries, gated or squared-ReLU MLP.

A part keeps nothing of a forward pass, so threads may share a network; `ForwardPass` is handed down instead.
`dlm.inference` and `dlm.adapters` replace parts by others with the same call signature.
Shapes: B batch, T positions of the window, Q queried positions, M mask tokens, D width, H heads, G kv heads, K head dim, R rank,
I and O features in and out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.models import attention, elementwise
from dlm.models.axes import coordinates
from dlm.models.cache import KVCache, RaggedCache, TextCache, WindowCache
from dlm.models.config import TransformerConfig
from dlm.models.convolution import Near, ShortConvolution
from dlm.models.dropout import Dropout
from dlm.models.rope import frequencies

AnyCache = KVCache | RaggedCache | TextCache | WindowCache


class MaskTokens(NamedTuple):
    """Where the mask tokens of a forward pass stand, for an adapter that acts on them alone (`dlm.adapters.lora`)."""

    index_M: Tensor  # their places in the flattened (B, Q)
    gate_BQ1: Tensor  # 1.0 at mask tokens, else 0.0
    alone: bool  # no other tokens are read
    adapter: nn.Module  # the embedding of the adapter that acts


class ForwardPass(NamedTuple):
    """One forward pass, as every block reads it."""

    cos: Tensor  # (B or 1, 1, Q, K)
    sin: Tensor
    mask: attention.Mask = None
    is_causal: bool = False
    cache: AnyCache | None = None
    mask_tokens: MaskTokens | None = None
    neighbours: Near = None  # which a short convolution reads; None: those of plain whole rows
    sliding: Tensor | None = None  # mask (B, 1, Q, T) of the layers that slide
    level: Tensor | None = None  # (B, C), which `dlm.models.adaln` shifts, scales and gates by
    at_M: Tensor | None = None  # the places in the flattened (B, Q) that the last block alone gives, (M, D)

    def mask_of(self, attends: Attention) -> tuple[attention.Mask, bool]:
        """The mask of a layer's attention, and whether it is plainly causal."""
        if self.sliding is not None and attends.layer in attends.config.sliding_layers:
            return self.sliding, False
        return self.mask, self.is_causal


class LowRank(NamedTuple):
    """An adapter of a linear layer: scale * B A x is added to W x."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float


class Linear(nn.Linear):
    """A linear layer that is told where the mask tokens stand. An adapter may act on them, this layer does not."""

    def forward(self, x: Tensor, mask_tokens: MaskTokens | None = None) -> Tensor:
        return self.adapt(x, F.linear(x, self.weight, self.bias), mask_tokens)

    def adapt(self, x: Tensor, y: Tensor, mask_tokens: MaskTokens | None) -> Tensor:
        """y = W x, plus the product of an adapter."""
        return y

    @property
    def low_rank(self) -> LowRank | None:
        """The matrices of the adapter, if there is one."""
        return None


class Embedding(nn.Embedding):
    """Embeddings of tokens. An adapter replaces this module by one that finds the mask tokens."""

    def mask_tokens(self, z_BQ: Tensor, pos_BQ: Tensor) -> MaskTokens | None:
        """Where an adapter acts; None: nowhere."""
        return None

    def forward(self, z_BQ: Tensor, mask_tokens: MaskTokens | None = None) -> Tensor:
        return super().forward(z_BQ)


class Head(Linear):
    """The output layer: logits (..., V) of hidden states (..., D)."""

    def draft(self, hidden: Tensor) -> Tensor:
        """Logits that draft tokens are drawn from. They may be approximate, since draft tokens are verified; here they are exact."""
        logits: Tensor = self(hidden)
        return logits


class RMSNorm(nn.RMSNorm):
    """The gain follows the input's dtype: under autocast a float32 gain would keep torch from its fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None and elementwise.pay(x):
            return elementwise.rms_norm(x, self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)
        return F.rms_norm(x, self.normalized_shape, None if self.weight is None else self.weight.to(x.dtype), self.eps)


def rotary(
    pos_BQ: Tensor,
    head_dim: int,
    base: float,
    scaling: tuple[float, ...] = (),
    factors: tuple[float, ...] = (),
    axes: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, Q, K), float32, of RoPE (Su et al. 2104.09864), halves rotated as in Llama; the rest as of `frequencies`.

    axes: of a grid, among which the pairs of dimensions are divided, the first ones rotated by the first coordinate.
    """
    frequency_K, amplitude = frequencies(head_dim // (len(axes) or 1), base, scaling, pos_BQ.device, factors)
    at_BQA = coordinates(pos_BQ, axes) if axes else pos_BQ[..., None]
    angle_BQK = (at_BQA[..., None].float() * frequency_K).flatten(-2)
    angle_BQK = torch.cat([angle_BQK, angle_BQK], -1)[:, None]
    return (angle_BQK.cos(), angle_BQK.sin()) if amplitude == 1 else (angle_BQK.cos() * amplitude, angle_BQK.sin() * amplitude)


def rotate(x_BHQK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The leading dimensions of each head, as many as cos has, by its position; the others stay."""
    turned, kept = x_BHQK[..., : cos.shape[-1]], x_BHQK[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    turned = turned * cos.to(x_BHQK.dtype) + torch.cat([-second, first], -1) * sin.to(x_BHQK.dtype)
    return torch.cat([turned, kept], -1) if kept.shape[-1] else turned


class Rotary(nn.Module):
    """`rotary` of the positions of a forward pass."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pos_BQ: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return rotary(pos_BQ, config.rotary_dim or config.head_dim, config.rope_base, config.rope_scaling, config.rope_factors, config.axes)


class Attend(nn.Module):
    """Scaled dot-product attention: values (B, H, Q, K) that the queries read."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, q_BHQK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: attention.Mask, is_causal: bool) -> Tensor:
        if isinstance(mask, attention.FlexMask):
            return attention.attend_flex(q_BHQK, k_BGTK, v_BGTK, mask.pattern, mask.block_length)
        dropout = self.config.dropout if self.training else 0.0
        if isinstance(mask, attention.Tiles):
            return attention.attend_tiles(q_BHQK, k_BGTK, v_BGTK, mask, dropout)
        return attention.attend(q_BHQK, k_BGTK, v_BGTK, mask, is_causal, dropout)


class Attention(nn.Module):
    """Attention with grouped queries, rotary positions and optional qk-norm."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        inner, kv_inner = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.width, inner, bias=config.qkv_bias)
        self.k = Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.v = Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.out = Linear(inner, config.width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.attend = Attend(config)

    def forward(self, x_BQD: Tensor, forward_pass: ForwardPass) -> Tensor:
        cos, sin, _, _, cache, mask_tokens, *_ = forward_pass
        mask, is_causal = forward_pass.mask_of(self)
        q, k, v = self.heads(x_BQD, cos, sin, mask_tokens)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        return self.project_out(self.attend(q, k, v, mask, is_causal), mask_tokens)

    def heads(self, x_BQD: Tensor, cos: Tensor, sin: Tensor, mask_tokens: MaskTokens | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, Q, K), keys and values (B, G, Q, K) of these positions."""
        parts = self.project_in(x_BQD, mask_tokens)
        q, k, v = (part.view(*x_BQD.shape[:2], -1, self.config.head_dim) for part in parts)
        norms = (self.q_norm, self.k_norm) if self.config.qk_norm else (None, None)
        q, k = (self._turned(heads, norm, cos, sin) for heads, norm in zip((q, k), norms, strict=True))
        return q, k, v.transpose(1, 2)

    def _turned(self, x_BQHK: Tensor, norm: RMSNorm | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads (B, H, Q, K) normed and rotated."""
        weight = None if norm is None else norm.weight
        apart = weight is not None and weight.is_meta  # of a spread network: a hook fetches it as the module is called
        if elementwise.pay(x_BQHK) and not apart and cos.shape[-1] == x_BQHK.shape[-1]:
            turns = cos.transpose(1, 2), sin.transpose(1, 2)
            return elementwise.turned(x_BQHK, weight, self.config.norm_eps, *turns).transpose(1, 2)
        x_BHQK = x_BQHK.transpose(1, 2)
        return rotate(x_BHQK if norm is None else norm(x_BHQK), cos, sin)

    def project_in(self, x_BQD: Tensor, mask_tokens: MaskTokens | None) -> Sequence[Tensor]:
        """Features of queries, keys and values."""
        return [layer(x_BQD, mask_tokens) for layer in (self.q, self.k, self.v)]

    def project_out(self, read_BHQK: Tensor, mask_tokens: MaskTokens | None = None) -> Tensor:
        """(B, Q, D) of the values that the heads have read."""
        y_BQD: Tensor = self.out(read_BHQK.transpose(1, 2).flatten(2), mask_tokens)
        return y_BQD


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return elementwise.squared_relu(x) if elementwise.pay(x) else F.relu(x).square()


class MLP(nn.Module):
    """down(silu(gate x) * up x), or down(relu(up x)^2) where there is no gate."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.mlp_width, bias=False) if config.mlp == "swiglu" else None
        self.up = Linear(config.width, config.mlp_width, bias=False)
        self.down = Linear(config.mlp_width, config.width, bias=False)
        self.silu: nn.Module = nn.SiLU()
        self.ungated: nn.Module = SquaredReLU()

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The layers that read the input."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def forward(self, x: Tensor, mask_tokens: MaskTokens | None = None) -> Tensor:
        *gate, up = self.project_in(x, mask_tokens)
        return self.project_out(self.silu(gate[0]) * up if gate else self.ungated(up), mask_tokens)

    def project_in(self, x: Tensor, mask_tokens: MaskTokens | None) -> Sequence[Tensor]:
        """Features of gate, if there is one, and up."""
        return [layer(x, mask_tokens) for layer in self.inputs]

    def project_out(self, hidden: Tensor, mask_tokens: MaskTokens | None) -> Tensor:
        y: Tensor = self.down(hidden, mask_tokens)
        return y


class Block(nn.Module):
    """x + attention(conv(norm(x))), then x + mlp(norm(x)); conv, where there is one, reads a few neighbours."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm: nn.Module = RMSNorm(config.width, eps=config.norm_eps)
        self.conv = ShortConvolution(config) if config.conv else None
        self.attention = Attention(config, layer)
        self.mlp_norm: nn.Module = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp: nn.Module = MLP(config)  # or `dlm.models.experts.Experts`
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, forward_pass: ForwardPass) -> Tensor:
        read = self.attention_norm(x)
        if self.conv is not None:
            cache = forward_pass.cache
            source = read if cache is None else cache.write_conv(self.attention.layer, read)
            read = self.conv(read, forward_pass.neighbours, source)
        x = x + self.dropout(self.attention(read, forward_pass))
        if forward_pass.at_M is not None:
            x = x.flatten(0, 1).index_select(0, forward_pass.at_M)
        y: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x), forward_pass.mask_tokens))
        return y


class Blocks(nn.ModuleList):
    """All blocks, one after another."""

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]

    def forward(self, x: Tensor, forward_pass: ForwardPass) -> Tensor:
        x = self.before_last(x, forward_pass._replace(at_M=None))
        y: Tensor = self[-1](x, forward_pass)
        return y

    def before_last(self, x: Tensor, forward_pass: ForwardPass) -> Tensor:
        """After all blocks but the last one."""
        for block in islice(self, len(self) - 1):
            x = block(x, forward_pass)
        return x

    def lets_last_apart(self, forward_pass: ForwardPass) -> bool:
        """Whether the last block of this pass may be computed by itself, at some positions."""
        plain = isinstance(forward_pass.mask, Tensor | None) and not forward_pass.is_causal and forward_pass.mask_tokens is None
        return plain and not torch.is_grad_enabled()


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


class TimeTable(nn.Module):
    """A learned vector for each step of training. t of floating point is a noise level in 0 .. 1, a whole number the step itself."""

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(steps, width))

    def forward(self, t_B: Tensor) -> Tensor:
        steps = len(self.weight)
        step_B = (t_B * steps).ceil().long() - 1 if t_B.is_floating_point() else t_B
        return self.weight[step_B.clamp(0, steps - 1)]
