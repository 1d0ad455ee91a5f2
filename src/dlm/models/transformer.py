"""One backbone for diffusers, their autoregressive twins and converted checkpoints.

Pre-norm transformer: RMSNorm, rotary positions, grouped queries, optional qk-norm, gated (SwiGLU) or squared-ReLU MLP.
Shapes: B batch, T positions of the window, Q queried positions, V vocabulary, D width, H heads, G kv heads, K head dim.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.models import attention
from dlm.models.cache import KVCache, RaggedCache, WindowCache

AnyCache = KVCache | RaggedCache | WindowCache


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches; everything needed to rebuild the network."""

    vocab_size: int
    window: int = 256
    layers: int = 6
    heads: int = 6
    kv_heads: int = 0  # 0: as many as heads
    width: int = 384
    head_dim: int = 0  # 0: width / heads
    mlp: str = "relu2"  # relu2 | swiglu
    mlp_width: int = 0  # 0: 4 x width for relu2, 8/3 x width for swiglu
    attention: str = "full"  # full | causal | block_causal
    block_length: int = 0  # for block_causal
    rope_base: float = 10_000.0
    rope_scaling: tuple[float, ...] = ()  # Llama 3: factor, low and high frequency factor, window before
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    tied: bool = False
    time_conditioning: bool = False
    dropout: float = 0.0
    backend: str = "auto"  # auto | sdpa | flex

    def __post_init__(self) -> None:
        for name in ("vocab_size", "window", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        derived = {
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.width // self.heads,
            "mlp_width": self.mlp_width or (4 * self.width if self.mlp == "relu2" else -(-8 * self.width // 3 // 8) * 8),
        }
        for name, value in derived.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            object.__setattr__(self, name, value)
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.heads} heads need a divisor of kv_heads ({self.kv_heads}) and an even head_dim ({self.head_dim})")
        object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))  # JSON has lists
        if len(self.rope_scaling) not in (0, 4):
            raise ValueError(f"rope_scaling has four numbers or none, got {self.rope_scaling}")
        if self.mlp not in ("relu2", "swiglu"):
            raise ValueError(f"unknown mlp {self.mlp!r}; known: relu2, swiglu")
        if self.attention not in attention.PATTERNS:
            raise ValueError(f"unknown attention {self.attention!r}; known: {', '.join(attention.PATTERNS)}")
        if self.attention == "block_causal" and (self.block_length < 1 or self.window % self.block_length):
            raise ValueError(f"block_length {self.block_length} must divide the window {self.window}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in 0 .. 1, got {self.dropout}")
        if self.backend not in ("auto", "sdpa", "flex"):
            raise ValueError(f"unknown attention backend {self.backend!r}; known: auto, sdpa, flex")

    def with_(self, **changes: Any) -> TransformerConfig:
        """A copy with some fields changed; derived widths follow unless given."""
        derived = {name: 0 for name in ("kv_heads", "head_dim", "mlp_width")}
        return replace(self, **(derived | changes if {"heads", "width", "mlp"} & changes.keys() else changes))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def forward_flops(self, *, keys: int | None = None) -> tuple[int, int]:
        """FLOPs of a token in (the blocks, the output head) when it attends to `keys` positions, by default a window.

        Two for each multiply and add; embedding, norms, rotations and softmax are free, as `torch.utils.flop_counter` counts.
        """
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = 2 * self.width * (inner + kv_inner) + (3 if self.mlp == "swiglu" else 2) * self.width * self.mlp_width
        attention = 4 * inner * (self.window if keys is None else keys)
        return self.layers * (2 * weights + attention), 2 * self.width * self.vocab_size


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


class RMSNorm(nn.RMSNorm):
    """The gain follows the input's dtype: under autocast a float32 gain would keep torch from its fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, None if self.weight is None else self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        inner, kv_inner = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.out = nn.Linear(inner, config.width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x_BQD: Tensor, cos: Tensor, sin: Tensor, mask: Any, is_causal: bool, cache: AnyCache | None) -> Tensor:
        config, (batch, queries, _) = self.config, x_BQD.shape
        q, k, v = (linear(x_BQD).view(batch, queries, -1, config.head_dim).transpose(1, 2) for linear in (self.q, self.k, self.v))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        if isinstance(mask, tuple):  # ("flex", block length)
            out_BHQK = attention.attend_flex(q, k, v, config.attention, mask[1])
        else:
            out_BHQK = attention.attend(q, k, v, mask, is_causal, config.dropout if self.training else 0.0)
        y_BQD: Tensor = self.out(out_BHQK.transpose(1, 2).reshape(batch, queries, -1))
        return y_BQD


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False) if config.mlp == "swiglu" else None
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x)).square() if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        y: Tensor = self.down(hidden)
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
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, mask, is_causal, cache))
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


class Transformer(nn.Module):
    """A `Denoiser`: token ids in, logits out; bidirectional, block-causal or causal by its config."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.time = TimeEmbedding(config.width) if config.time_conditioning else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.adapter: Any = None  # of dlm.convert.lora: told at every call where the masks stand
        self.reset()

    def reset(self) -> None:
        """Draw fresh weights from the global generator: normal 0.02, residual outputs zero, so that a block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.zeros_(weight)
        if self.time is not None:
            nn.init.zeros_(self.time.linear.weight)
        if self.config.tied:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def parameters_count(self) -> int:
        """Number of trainable numbers, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `batch` rows."""
        c = self.config
        shape = (c.layers, batch, c.kv_heads, capacity or c.window, c.head_dim)
        return KVCache(*shape, dtype=self.embed.weight.dtype, device=self.device)

    def ragged_cache(self, batch: int, capacity: int) -> RaggedCache:
        """An empty cache for `batch` rows that grow at their own pace."""
        c = self.config
        return RaggedCache(c.layers, batch, c.kv_heads, capacity, c.head_dim, dtype=self.embed.weight.dtype, device=self.device)

    def window_cache(self, batch: int) -> WindowCache:
        """An empty cache of a whole window for `batch` rows."""
        c = self.config
        return WindowCache(c.layers, batch, c.kv_heads, c.window, c.head_dim, dtype=self.embed.weight.dtype, device=self.device)

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
        own_BQQ: Tensor | None = None,
        at_BQ: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, Q, V).

        z_BQ: int64 ids; t_B: noise level, read only with time_conditioning; pos_BQ: positions, by default counted over
        the valid tokens so that padding on either side leaves no gap; valid_BT: False at padding, never attended to.
        With a KVCache, z continues what it holds, and valid_BT covers cached and new positions; with a WindowCache, pos_BQ are the
        slots of its window that z overwrites; with a RaggedCache, z at pos_BQ continues every row where it ends.
        own_BQQ: bool, for a RaggedCache: which of the new positions each new one reads, besides all that its row holds.
        pattern `clean`: z is [noisy | clean] (B, 2T) and every noisy block reads the clean blocks before it; logits of the noisy half.
        pattern `shadow`: z is [text | masks] (B, 2T) and a mask guesses its position without seeing the text there (but for
        what deeper layers of other positions have read of it); logits of both.
        pattern `introspective`: z is [masks | text] (B, 2T), causal; a mask reads its block of masks and the text before the block;
        logits of both. phase_B: how far into a block each row begins.
        block_length: of block-causal attention, another one than the network's own.
        at_BQ: bool, the only positions that get logits; those of the others are 0.
        """
        if isinstance(cache, RaggedCache):
            assert pos_BQ is not None and own_BQQ is not None
            mask, is_causal = cache.begin(own_BQQ)[:, None], False
        else:
            block_length = block_length or self.config.block_length
            pos_BQ, mask, is_causal = self._attends(z_BQ, pos_BQ, valid_BT, cache, pattern, block_length, phase_B)
        if self.adapter is not None:
            self.adapter.begin(z_BQ, pos_BQ)
        x_BQD = self.embed(z_BQ)
        if self.time is not None:
            if t_B is None:
                raise ValueError("this network is conditioned on time: give t_B")
            x_BQD = x_BQD + self.time(t_B)[:, None]
        x_BQD = self.dropout(x_BQD)
        cos, sin = rotary(pos_BQ, self.config.head_dim, self.config.rope_base, self.config.rope_scaling)
        for block in self.blocks:
            x_BQD = block(x_BQD, cos, sin, mask, is_causal, cache)
        if isinstance(cache, KVCache | RaggedCache):
            cache.advance(z_BQ.shape[1])
        if pattern == "clean":
            x_BQD = x_BQD[:, : x_BQD.shape[1] // 2]
        if at_BQ is not None:
            logits_MV: Tensor = self.head(self.norm(x_BQD[at_BQ]))
            return logits_MV.new_zeros(*z_BQ.shape, logits_MV.shape[-1]).index_put_((at_BQ,), logits_MV)
        logits_BQV: Tensor = self.head(self.norm(x_BQD))
        return logits_BQV

    def _attends(
        self,
        z_BQ: Tensor,
        pos_BQ: Tensor | None,
        valid_BT: Tensor | None,
        cache: Any,
        pattern: str,
        block_length: int,
        phase_B: Tensor | None,
    ) -> tuple[Tensor, Any, bool]:
        """(pos_BQ, mask, is_causal): where the queries stand and what they read."""
        config, (batch, queries), device = self.config, z_BQ.shape, z_BQ.device
        if pattern:
            half_BT = torch.arange(queries // 2, device=device)[None] if pos_BQ is None else pos_BQ
            if pattern == "clean":
                mask_BQT = attention.beside_clean(half_BT, block_length)
            elif pattern == "introspective":
                mask_BQT = attention.introspective(half_BT, block_length, phase_B)
            else:
                mask_BQT = attention.beside_shadow(queries // 2, device)
            return torch.cat([half_BT, half_BT], 1), mask_BQT[:, None], False
        if isinstance(cache, WindowCache):
            assert pos_BQ is not None
            slots_BT, filled_BT = cache.begin(pos_BQ)
            if filled_BT is None and config.attention == "full":
                return pos_BQ, None, False
            mask_BQT = attention.allowed(config.attention, pos_BQ[:, :, None], slots_BT[:, None, :], block_length)
            return pos_BQ, (mask_BQT if filled_BT is None else mask_BQT & filled_BT[:, None])[:, None], False
        held = cache.length if cache is not None else 0
        plain = pos_BQ is None and valid_BT is None
        if pos_BQ is None:
            pos_BT = (
                torch.arange(held + queries, device=device)[None] if valid_BT is None else (valid_BT.long().cumsum(-1) - 1).clamp(min=0)
            )
            pos_BQ = pos_BT[:, held:]
        else:
            pos_BT = torch.cat([torch.arange(held, device=device).expand(batch, held), pos_BQ], 1) if held else pos_BQ
        square = plain and held == 0
        if self._use_flex(z_BQ, square):
            return pos_BQ, ("flex", block_length), False
        if held and queries == 1 and valid_BT is None and config.attention == "causal":
            return pos_BQ, None, False  # one new token reads everything before it
        return pos_BQ, *attention.mask(config.attention, block_length, pos_BQ, pos_BT, valid_BT, plain=square)

    def _use_flex(self, z_BQ: Tensor, square: bool) -> bool:
        backend = self.config.backend
        if backend == "flex" and not square:
            raise ValueError("the flex backend reads whole unpadded windows; use backend='sdpa' with padding or a cache")
        # SDPA has fused kernels for full and causal; only block-causal needs a mask there, which flex skips over
        return backend == "flex" or (backend == "auto" and square and self.config.attention == "block_causal" and z_BQ.is_cuda)


def predict_beside(network: nn.Module, z_BT: Tensor, x_BT: Tensor, block_length: int) -> Tensor:
    """Logits (B, T, V) of block diffusion in float32: every block of z beside the clean blocks of x before it. network may be wrapped."""
    logits: Tensor = network(torch.cat([z_BT, x_BT], 1), pattern="clean", block_length=block_length).float()
    return logits


def predict_next(network: nn.Module, z_BT: Tensor, start: int | None) -> Tensor:
    """Logits (B, T, V) of an autoregressive network in float32. z: the text after a place for the start token, without its last token.

    start: the token that goes to that place; None for a network that reads none: its law of the first token is taken as uniform.
    """
    if start is None:
        logits: Tensor = network(z_BT[:, 1:]).float()
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)
    logits = network(torch.cat([torch.full_like(z_BT[:, :1], start), z_BT[:, 1:]], 1)).float()
    return logits
