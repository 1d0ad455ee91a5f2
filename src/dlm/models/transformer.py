"""One backbone for diffusers, their autoregressive twins and converted checkpoints.

Pre-norm transformer: RMSNorm, rotary positions, grouped queries, optional qk-norm, gated (SwiGLU) or squared-ReLU MLP.
Shapes: B batch, T positions of the window, Q queried positions, V vocabulary, D width, H heads, G kv heads, K head dim.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dlm.models import attention
from dlm.models.block import AnyCache, Block, RMSNorm, TimeEmbedding, project, rotary
from dlm.models.cache import KVCache, RaggedCache, TextCache, WindowCache
from dlm.models.config import TransformerConfig

SMALL = 16  # positions of a call that compiled blocks are for


class Transformer(nn.Module):
    """A `Denoiser`: token ids in, logits out; bidirectional, block-causal or causal by its config."""

    quantized = False  # of `dlm.inference.fused`: the weights are gone, and a network that is saved needs them

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.time = TimeEmbedding(config.width) if config.time_conditioning else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.turns: tuple[Tensor, Tensor] | None = None  # of dlm.inference.fused: cos and sin (T, K) of every position
        self.head_product: nn.Module | None = None  # of dlm.inference.fused, as of the layers of a block
        self.coarse: nn.Module | None = None  # of dlm.inference.fused: the head in few bits
        self.compiled: Any = None  # of dlm.inference.fused: all blocks, compiled
        self.adapter: Any = None  # of dlm.adapters.lora: told at every call where the masks stand
        self.chain: nn.Module | None = None  # of dlm.adapters.chain: reads what the adapter's masks say
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

    def read_out(self, hidden_BQD: Tensor, *, coarsely: bool = False) -> Tensor:
        """Logits (B, Q, V) of hidden states as `forward` gives them; coarsely: for guesses that are verified."""
        if coarsely and self.coarse is not None and hidden_BQD.device.type == "cpu":
            guesses_BQV: Tensor = self.coarse(hidden_BQD)
            return guesses_BQV
        (logits_BQV,) = project(self.head_product, (self.head,), hidden_BQD)
        return logits_BQV

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
        logits: bool = True,
        states: list[Tensor] | None = None,
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
        A TextCache keeps the text of its first call; those after it read the text and one another by own_BQQ, here bool (B, Q, T + Q).
        at_BQ: bool, the only positions that get logits; those of the others are 0.
        logits: False gives what the head would read instead, (B, Q, D); states: a list that gets it beside the logits.
        """
        if own_BQQ is not None:
            assert pos_BQ is not None
            assert isinstance(cache, RaggedCache | TextCache)
            mask, is_causal = cache.begin(own_BQQ), False
            if mask is not None:  # added to the scores: made once, not in every layer
                scores_BQT = torch.zeros(mask.shape, dtype=self.embed.weight.dtype, device=mask.device)
                mask = scores_BQT.masked_fill_(~mask, -torch.inf)[:, None]
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
        cos, sin = self._rotary(pos_BQ)
        span = cache.span(z_BQ.shape[1]) if isinstance(cache, KVCache | RaggedCache) and self._is_small(z_BQ) and not is_causal else None
        if span is not None:
            x_BQD = self.compiled(self, x_BQD, cos, sin, cache, span, mask)
        else:
            for block in self.blocks:
                x_BQD = block(x_BQD, cos, sin, mask, is_causal, cache)
        if isinstance(cache, KVCache | RaggedCache):
            cache.advance(z_BQ.shape[1])
        if pattern == "clean":
            x_BQD = x_BQD[:, : x_BQD.shape[1] // 2]
        if not logits or states is not None:
            hidden_BQD: Tensor = self.norm(x_BQD)
            if not logits:
                return hidden_BQD
            cast(list[Tensor], states).append(hidden_BQD)
        if at_BQ is not None and not (x_BQD.device.type == "cpu" and bool(at_BQ.all())):
            logits_MV = self.read_out(self.norm(x_BQD[at_BQ]))
            return logits_MV.new_zeros(*z_BQ.shape, logits_MV.shape[-1]).index_put_((at_BQ,), logits_MV)
        return self.read_out(self.norm(x_BQD))

    def _is_small(self, z_BQ: Tensor) -> bool:
        """Whether it is a call of decoding for which blocks are compiled."""
        if self.compiled is None or z_BQ.numel() > SMALL or torch.is_grad_enabled():
            return False
        return self.adapter is None or self.adapter.masks_M is None or self.adapter.joined

    def _rotary(self, pos_BQ: Tensor) -> tuple[Tensor, Tensor]:
        if self.turns is None:
            return rotary(pos_BQ, self.config.head_dim, self.config.rope_base, self.config.rope_scaling)
        cos, sin = self.turns
        return cos[pos_BQ][:, None], sin[pos_BQ][:, None]

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
