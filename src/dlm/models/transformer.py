"""One backbone for diffusion models, autoregressive models and converted checkpoints.

Pre-norm transformer: RMSNorm, rotary positions, grouped queries, optional qk-norm, gated (SwiGLU) or squared-ReLU MLP.
Shapes: B batch, T positions of the window, Q queried positions, V vocabulary, D width, H heads, G kv heads, K head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.models import attention
from dlm.models.attention import FlexMask, Mask, Tiles
from dlm.models.axes import GroupEmbedding
from dlm.models.block import AnyCache, Attend, Blocks, Embedding, ForwardPass, Head, MaskTokens, RMSNorm, Rotary, TimeEmbedding, TimeTable
from dlm.models.cache import KVCache, RaggedCache, TextCache, WindowCache
from dlm.models.config import TransformerConfig
from dlm.models.convolution import BesideClean, Near, neighbours, offsets
from dlm.models.dropout import Dropout
from dlm.models.experts import make_block
from dlm.models.last_block import blocks_at, pick


class Attends(NamedTuple):
    """What the positions of a forward pass attend to."""

    pos_BQ: Tensor
    mask: Mask
    is_causal: bool
    pos_BT: Tensor | None = None  # of keys; None: those of the queries


def _keys(attends: Attends, cache: AnyCache | None) -> Tensor:
    """The positions of the keys (B, T); those of the queries, the same tensor, if they are the same."""
    if isinstance(cache, RaggedCache) or (isinstance(cache, TextCache) and cache.beside):
        return cache.positions(attends.pos_BQ)
    return attends.pos_BQ if attends.pos_BT is None else attends.pos_BT


def _allowed(attends: Attends, pos_BT: Tensor) -> Tensor | None:
    """bool (B, Q, T), the keys that each query reads; None for all."""
    pos_BQ, mask, is_causal, _ = attends
    if isinstance(mask, Tensor):
        return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    if mask is None and not is_causal:
        return None
    pattern, block_length = (mask.pattern, mask.block_length) if isinstance(mask, FlexMask) else ("causal", 0)
    return attention.allowed(pattern, pos_BQ[:, :, None], pos_BT[:, None, :], block_length)


class Transformer(nn.Module):
    """A `Denoiser`: token ids in, logits out; bidirectional, block-causal or causal by its config."""

    picks = True  # `index_BC`

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.time: TimeEmbedding | TimeTable | None = None
        if config.time_conditioning:
            self.time = TimeTable(config.time_steps, config.width) if config.time_steps else TimeEmbedding(config.width)
        self.group_embed = GroupEmbedding(config.axes, config.groups, config.width) if config.groups else None
        self.rotary = Rotary(config)
        self.blocks = Blocks(make_block(config, i) for i in range(config.layers))
        self.taps = offsets(config.attention, config.conv)  # of the weights: a view with another attention keeps them
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = Head(config.width, config.vocab_size, bias=False)
        self.dropout = Dropout(config.dropout)
        self.reset()

    def reset(self) -> None:
        """Draw fresh weights from the global generator: normal 0.02, residual outputs zero, so that a block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", ".down.weight")):
                nn.init.zeros_(weight)
        if isinstance(self.time, TimeEmbedding):
            nn.init.zeros_(self.time.linear.weight)
        if self.config.tied:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def parameters_count(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def quantized(self) -> bool:
        """Whether the blocks hold quantized weights alone, which can be neither trained nor saved."""
        weight: Tensor | None = next(iter(self.blocks)).attention.out.weight
        return weight is None

    def read_out(self, hidden_BQD: Tensor, *, draft: bool = False) -> Tensor:
        """Logits (B, Q, V) of hidden states as `forward` gives them. draft: of draft tokens, which may be approximate (`Head.draft`)."""
        logits_BQV: Tensor = self.head.draft(hidden_BQD) if draft else self.head(hidden_BQD)
        return logits_BQV

    def mix(self, weights_BQV: Tensor) -> Tensor:
        """Embeddings (B, Q, D) mixed by these weights of tokens."""
        return weights_BQV.to(self.embed.weight.dtype) @ self.embed.weight

    def cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `batch` rows."""
        c = self.config
        shape = (c.layers, batch, c.kv_heads, capacity or c.window, c.head_dim, c.conv_width)
        return KVCache(*shape, dtype=self.embed.weight.dtype, device=self.device)

    def ragged_cache(self, batch: int, capacity: int) -> RaggedCache:
        """An empty cache for `batch` rows that grow at their own pace."""
        c = self.config
        shape = (c.layers, batch, c.kv_heads, capacity, c.head_dim, c.conv_width)
        return RaggedCache(*shape, dtype=self.embed.weight.dtype, device=self.device)

    def window_cache(self, batch: int, window: int = 0) -> WindowCache:
        """An empty cache of so many positions, by default a whole window, for `batch` rows."""
        c = self.config
        shape = (c.layers, batch, c.kv_heads, window or c.window, c.head_dim, c.conv_width)
        return WindowCache(*shape, dtype=self.embed.weight.dtype, device=self.device)

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
        """Logits (B, Q, V).

        z_BQ: int64 ids; t_B: noise level, read only with time_conditioning; pos_BQ: positions, by default counted over
        the valid tokens so that padding on either side leaves no gap; valid_BT: False at padding, never attended to.
        With a KVCache, z continues its text, and valid_BT covers cached and new positions; with a WindowCache, z overwrites what stands
        at pos_BQ of its window; with a RaggedCache, z at pos_BQ continues every row where it ends.
        own_BQQ: bool, for a RaggedCache: the new positions that each new one reads, besides all that its row holds.
        pattern `clean`: z is [noisy | clean] (B, 2T) and every noisy block reads the clean blocks before it; logits of the noisy half.
        pattern `shadow`: z is [text | masks] (B, 2T) and a mask predicts its position without reading the text there (deeper
        layers read other positions, which have read it, as those beside it have by a short convolution); logits of both. valid_BT: of
        the text.
        pattern `introspective`: z is [masks | text] (B, 2T), causal; a mask reads its block of masks and the text before the block;
        logits of both. phase_B: the offset in its block at which each row begins.
        block_length: of block-causal attention, in place of the network's own. begin_B1: with attention `causal_text`, the position of
        each row at which the only block begins that reads itself fully; without it the whole text does.
        A TextCache keeps the text of its first forward pass; later ones read it, and their own positions by own_BQQ, bool (B, Q, T + Q).
        at_BQ: bool, the only positions that get logits (of `clean`: in the noisy half); those of the others are 0.
        index_BC: int64, places among the Q of each row that alone get logits, which are then (B, C, V): with a large vocabulary, zeros of
        all the others take time and memory.
        mixed_BQV: weights of tokens, whose embeddings are read so mixed in place of those of z.
        logits: False returns the hidden states that the head reads instead, (B, Q, D); states: a list that they are appended to.
        """
        block_length = block_length or self.config.block_length
        if pattern == "clean" and z_BQ.shape[1] <= 2 * block_length:  # one block, which reads no clean one
            z_BQ, pattern = z_BQ[:, : z_BQ.shape[1] // 2], ""
        attends = self._attends(z_BQ, pos_BQ, valid_BT, cache, pattern, block_length, phase_B, begin_B1, own_BQQ)
        pos_BQ, mask, is_causal, _ = attends
        mask_tokens = self.embed.mask_tokens(z_BQ, pos_BQ)
        x_BQD = self.embed(z_BQ, mask_tokens) if mixed_BQV is None else self.mix(mixed_BQV)
        if self.group_embed is not None:
            x_BQD = x_BQD + self.group_embed(pos_BQ)
        if self.time is not None:
            if t_B is None:
                raise ValueError("this network is conditioned on time: give t_B")
            x_BQD = x_BQD + self.time(t_B)[:, None]
        if self.config.embed_norm:
            x_BQD = F.rms_norm(x_BQD, x_BQD.shape[-1:], eps=self.config.norm_eps)
        cos, sin = self.rotary(pos_BQ)
        near = self._neighbours(attends, cache) if self.taps else None
        sliding = self._sliding(attends, cache) if self.config.sliding_layers else None
        forward_pass = ForwardPass(cos, sin, mask, is_causal, cache, mask_tokens, near, sliding)
        alone = logits and states is None
        at_BC = index_BC if alone and pattern != "clean" else None
        at_M = self._alone(at_BQ, mask_tokens) if alone and at_BC is None else None
        skipped = z_BQ.shape[1] // 2 if pattern == "clean" else 0
        at = at_M + at_M // skipped * skipped if skipped and at_M is not None else at_M
        x_BQD = blocks_at(self.blocks, self.dropout(x_BQD), forward_pass._replace(at_M=at), at_BC)
        if isinstance(cache, KVCache | RaggedCache):
            cache.advance(z_BQ.shape[1])
        if skipped and at_M is None:
            x_BQD = x_BQD[:, :skipped]
        if not logits:
            hidden_BQD: Tensor = self.norm(x_BQD)
            return hidden_BQD
        if states is not None:
            states.append(self.norm(x_BQD))
        if index_BC is not None:
            x_BQD, at_BQ = pick(x_BQD, index_BC) if at_BC is None else x_BQD, None
        return self._logits(x_BQD, at_BQ, at_M)

    def _alone(self, at_BQ: Tensor | None, mask_tokens: MaskTokens | None) -> Tensor | None:
        """The places that the last block alone is asked for in eager training on a CPU (M,); None: all of them."""
        plain = type(self.blocks) is Blocks and mask_tokens is None and self.config.experts is None
        if at_BQ is None or not plain or not torch.is_grad_enabled() or at_BQ.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return at_BQ.flatten().nonzero().squeeze(-1)

    def _logits(self, x_BQD: Tensor, at_BQ: Tensor | None, at_M: Tensor | None = None) -> Tensor:
        """at_M: those of at_BQ, which x holds alone, (M, D)."""
        if at_M is not None and at_BQ is not None:
            logits_MV = self.read_out(self.norm(x_BQD))
            return logits_MV.new_zeros(at_BQ.numel(), logits_MV.shape[-1]).index_copy(0, at_M, logits_MV).view(*at_BQ.shape, -1)
        if at_BQ is None or (x_BQD.device.type == "cpu" and bool(at_BQ.all())):
            return self.read_out(self.norm(x_BQD))
        at_M = at_BQ.flatten().nonzero().squeeze(-1)  # the host waits for a GPU here, and not again below
        logits_MV = self.read_out(self.norm(x_BQD.flatten(0, 1)[at_M]))
        return logits_MV.new_zeros(at_BQ.numel(), logits_MV.shape[-1]).index_copy_(0, at_M, logits_MV).view(*at_BQ.shape, -1)

    def _tiles(self, z_BQ: Tensor, block_length: int) -> Tiles | None:
        """The mask of [noisy | clean] in eager work on a CPU, whose kernels compute what a mask forbids too; None: by a plain mask."""
        length = z_BQ.shape[1] // 2
        fits = self.config.attention == "block_causal" and length % attention.TILE == length % block_length == 0
        plain = type(self.blocks) is Blocks and all(type(block.attention.attend) is Attend for block in self.blocks)
        if not (fits and plain) or self.config.sliding_layers or z_BQ.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return attention.tiles_beside_clean(length, block_length, z_BQ.device)

    def _neighbours(self, attends: Attends, cache: AnyCache | None) -> Near:
        """The neighbours that the short convolutions read: those that attention reads. None: of whole rows that nothing masks."""
        if isinstance(attends.mask, Tiles):
            return BesideClean(attends.mask.block_length)
        pos_BT = _keys(attends, cache)
        if pos_BT is attends.pos_BQ and attends.mask is None and (self.taps[-1] <= 0 if attends.is_causal else True):
            return None
        return neighbours(self.taps, attends.pos_BQ, pos_BT, _allowed(attends, pos_BT))

    def _sliding(self, attends: Attends, cache: AnyCache | None) -> Tensor:
        """bool (B, 1, Q, T): the keys that a sliding layer reads, the last ones of those that the others read."""
        pos_BT = _keys(attends, cache)
        allowed_BQT, near_BQT = _allowed(attends, pos_BT), pos_BT[:, None, :] > attends.pos_BQ[:, :, None] - self.config.sliding_window
        return (near_BQT if allowed_BQT is None else near_BQT & allowed_BQT)[:, None]

    def _attends(
        self,
        z_BQ: Tensor,
        pos_BQ: Tensor | None,
        valid_BT: Tensor | None,
        cache: AnyCache | None,
        pattern: str,
        block_length: int,
        phase_B: Tensor | None,
        begin_B1: Tensor | None,
        own_BQQ: Tensor | None,
    ) -> Attends:
        """The positions that this forward pass reads; arguments as of `forward`."""
        if own_BQQ is not None:
            return self._continues(pos_BQ, own_BQQ, cache)
        if pattern:
            return self._halves(z_BQ, pos_BQ, pattern, block_length, phase_B, valid_BT)
        if isinstance(cache, WindowCache):
            return self._window(pos_BQ, cache, block_length, begin_B1)
        return self._text(z_BQ, pos_BQ, valid_BT, cache, block_length, begin_B1)

    def _continues(self, pos_BQ: Tensor | None, own_BQQ: Tensor, cache: AnyCache | None) -> Attends:
        """New positions that read those of a cache, and one another by own_BQQ."""
        assert pos_BQ is not None
        assert isinstance(cache, RaggedCache | TextCache)
        mask = cache.begin(own_BQQ)
        if mask is None:
            return Attends(pos_BQ, None, False)
        scores_BQT = torch.zeros(mask.shape, dtype=self.embed.weight.dtype, device=mask.device)  # made once, not in every layer
        return Attends(pos_BQ, scores_BQT.masked_fill_(~mask, -torch.inf)[:, None], False)

    def _halves(
        self, z_BQ: Tensor, pos_BT: Tensor | None, pattern: str, block_length: int, phase_B: Tensor | None, valid_BT: Tensor | None
    ) -> Attends:
        """Two halves that stand at the same positions."""
        half, device = z_BQ.shape[1] // 2, z_BQ.device
        half_BT = torch.arange(half, device=device)[None] if pos_BT is None else pos_BT
        block_length = block_length or self.config.block_length
        if pattern == "clean" and pos_BT is None and (tiles := self._tiles(z_BQ, block_length)) is not None:
            return Attends(torch.cat([half_BT, half_BT], 1), tiles, False)
        if pattern == "clean":
            mask_BQT = attention.beside_clean(half_BT, block_length, causal=self.config.attention == "causal_text")
        elif pattern == "introspective":
            mask_BQT = attention.introspective(half_BT, block_length, phase_B)
        else:
            mask_BQT = attention.beside_shadow(half, device)
            if valid_BT is not None:
                mask_BQT = attention.text_only(mask_BQT.expand(len(z_BQ), -1, -1), torch.cat([valid_BT, valid_BT], 1))
        return Attends(torch.cat([half_BT, half_BT], 1), mask_BQT[:, None], False)

    def _window(self, pos_BQ: Tensor | None, cache: WindowCache, block_length: int, begin_B1: Tensor | None) -> Attends:
        """Some positions of a window, computed anew."""
        assert pos_BQ is not None
        slots_BT, filled_BT = cache.begin(pos_BQ)
        if filled_BT is None and self.config.attention == "full":
            return Attends(pos_BQ, None, False, slots_BT)
        block_length = block_length or self.config.block_length
        if begin_B1 is None:
            mask_BQT = attention.allowed(self.config.attention, pos_BQ[:, :, None], slots_BT[:, None, :], block_length)
        else:
            mask_BQT = attention.causal_text(pos_BQ, slots_BT, begin_B1, block_length)
        return Attends(pos_BQ, (mask_BQT if filled_BT is None else mask_BQT & filled_BT[:, None])[:, None], False, slots_BT)

    def _text(
        self,
        z_BQ: Tensor,
        pos_BQ: Tensor | None,
        valid_BT: Tensor | None,
        cache: KVCache | RaggedCache | TextCache | None,
        block_length: int,
        begin_B1: Tensor | None = None,
    ) -> Attends:
        """A text, or the continuation of the text that a cache holds."""
        (batch, queries), device, pattern = z_BQ.shape, z_BQ.device, self.config.attention
        held = cache.length if isinstance(cache, KVCache) else 0
        plain = pos_BQ is None and valid_BT is None
        if pos_BQ is None:
            count_1T = torch.arange(held + queries, device=device)[None]
            pos_BT = count_1T if valid_BT is None else (valid_BT.long().cumsum(-1) - 1).clamp(min=0)
            pos_BQ = pos_BT[:, held:]
        else:
            pos_BT = torch.cat([torch.arange(held, device=device).expand(batch, held), pos_BQ], 1) if held else pos_BQ
        if isinstance(cache, TextCache):
            cache.pos_BT = pos_BQ.expand(batch, -1)
        block_length, square = block_length or self.config.block_length, plain and held == 0
        if begin_B1 is not None:
            mask_BQT = attention.causal_text(pos_BQ, pos_BT, begin_B1, block_length)
            return Attends(pos_BQ, attention.text_only(mask_BQT, valid_BT)[:, None], False, pos_BT)
        if self._use_flex(z_BQ, square):
            return Attends(pos_BQ, FlexMask(pattern, block_length), False)
        if held and queries == 1 and valid_BT is None and pattern == "causal":
            return Attends(pos_BQ, None, False, pos_BT)  # one new token reads everything before it
        mask = attention.mask(pattern, block_length, pos_BQ, pos_BT, valid_BT, plain=square)
        return Attends(pos_BQ, *mask, None if square else pos_BT)

    def _use_flex(self, z_BQ: Tensor, square: bool) -> bool:
        backend = self.config.backend
        if backend == "flex" and not square:
            raise ValueError("the flex backend reads whole unpadded windows; use backend='sdpa' with padding or a cache")
        # SDPA has fused kernels for full and causal; only block-causal needs a mask there, which flex skips over
        return backend == "flex" or (backend == "auto" and square and self.config.attention == "block_causal" and z_BQ.is_cuda)


def predict_beside(network: nn.Module, z_BT: Tensor, x_BT: Tensor, block_length: int, at_BT: Tensor | None = None) -> Tensor:
    """Logits (B, T, V) of block diffusion in float32: every block of z beside the clean blocks of x before it. network may be wrapped.

    at_BT: bool, the only positions that get logits."""
    logits: Tensor = network(torch.cat([z_BT, x_BT], 1), pattern="clean", block_length=block_length, at_BQ=at_BT).float()
    return logits


def predict_next(network: nn.Module, z_BT: Tensor, start: int | None) -> Tensor:
    """Logits (B, T, V) of an autoregressive network in float32. z: the text after a place for the start token, without its last token.

    start: the token that goes to that place; None for a network that reads none: its first token is then uniform.
    """
    if start is None:
        logits: Tensor = network(z_BT[:, 1:]).float()
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)
    logits = network(torch.cat([torch.full_like(z_BT[:, :1], start), z_BT[:, 1:]], 1)).float()
    return logits
