"""Blocks compiled by torch.compile: forward passes of few positions over a KV cache, and those of whole texts without one.

Shapes: B batch, Q positions, D width, G kv heads, T capacity of the cache, K head dimension.
"""

from __future__ import annotations

import itertools
import os
import shutil
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlm.errors import InputError
from dlm.inference.fused import fuse, fused_layers
from dlm.models.block import Block, Blocks, ForwardPass, MaskTokens
from dlm.models.cache import Memory
from dlm.models.convolution import BesideClean, Near, Neighbours
from dlm.models.transformer import Transformer

BLOCKS_PER_GRAPH = 5  # at most: starting a graph takes time, compiling a large one far more
POSITIONS = 16  # of a forward pass at most, rows times positions, for which blocks are compiled


def compile(network: Transformer) -> Transformer:
    """Replace the blocks by compiled ones, in place: in decoding, most time goes into many small operations.

    The first forward pass of a shape takes seconds. The weights and the adapter have to stay as they are from here on: nothing but the
    shape of the input is checked before a compiled block is used, since a check of everything costs as much as it saves.
    """
    if network.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise InputError("a network is compiled with a C++ compiler, and there is none: install g++, or decode without compiling")
    if network.config.sliding_layers:
        raise InputError("a network whose attention slides in some layers is not compiled: leave compiling away")
    fuse(network)
    network.blocks = CompiledBlocks(network.blocks)
    return network


class CompiledBlocks(Blocks):
    """`Blocks`, compiled for decoding. An adapter that acts has a compilation of its own, for nothing else tells them apart.

    Of blocks with experts, whose tokens choose what is run, attention and norms alone are.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__(blocks)
        self.train(next(iter(self)).training)
        self.together = next(n for n in range(BLOCKS_PER_GRAPH, 0, -1) if len(self) % n == 0)  # a rest has a graph of its own
        self.plain = _compile(_over)
        self.reads_texts = next(iter(self)).attention.config.attention != "causal"
        self.experts = next(iter(self)).attention.config.experts is not None
        if self.experts:
            self.together = 1
        # of whole texts, by whether there is no mask and the number of blocks
        self.texts: dict[tuple[bool, int], Callable[..., Tensor]] = {}
        self.adapted: weakref.WeakKeyDictionary[nn.Module, Callable[..., Tensor]] = weakref.WeakKeyDictionary()  # by adapter

    def forward(self, x: Tensor, forward_pass: ForwardPass) -> Tensor:
        cache, few = forward_pass.cache, x.shape[0] * x.shape[1] <= POSITIONS
        span = None
        plain = forward_pass.level is None and not self.experts
        if few and plain and isinstance(cache, Memory) and not forward_pass.is_causal and not torch.is_grad_enabled():
            span = cache.span(x.shape[1])
        if span is not None and isinstance(cache, Memory):
            return self.over(x, forward_pass, cache, span)
        if self.lets_last_apart(forward_pass):
            return self.text(x, forward_pass, list(self))
        return super().forward(x, forward_pass)

    def lets_last_apart(self, forward_pass: ForwardPass) -> bool:
        """Whether the pass reads whole texts, whose blocks are compiled."""
        return self.reads_texts and forward_pass.cache is None and super().lets_last_apart(forward_pass)

    def before_last(self, x: Tensor, forward_pass: ForwardPass) -> Tensor:
        if self.lets_last_apart(forward_pass):
            return self.text(x, forward_pass, list(self)[:-1])
        return super().before_last(x, forward_pass)

    def text(self, x: Tensor, forward_pass: ForwardPass, blocks: Sequence[Block]) -> Tensor:
        """x (B, Q, D) of whole texts after these blocks."""
        mask_B1QT = forward_pass.mask
        assert mask_B1QT is None or isinstance(mask_B1QT, Tensor)
        cos, sin = (turn.expand(len(x), -1, -1, -1).contiguous() for turn in forward_pass[:2])
        near, level = _of_each_row(forward_pass.neighbours, len(x)), forward_pass.level
        if mask_B1QT is not None:
            mask_B1QT = mask_B1QT.expand(len(x), -1, -1, -1).contiguous()
        masks = [] if mask_B1QT is None else [(mask_B1QT, 0), (mask_B1QT, 2), (mask_B1QT, 3)]
        taps = [(tensor, axis) for tensor in near or () for axis in (0, 1)] + [(level, 0)] * (level is not None)
        for tensor, axis in [(x, 0), (x, 1), (cos, 0), (cos, 2), (sin, 0), (sin, 2), *masks, *taps]:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        for first in range(0, len(blocks), self.together):
            some = blocks[first : first + self.together]
            x = self._of_text(mask_B1QT is None, len(some))(some, x, cos, sin, mask_B1QT, near, level)
            if self.experts:
                x = x + blocks[first].mlp(blocks[first].mlp_norm(x))
        return x

    def _of_text(self, unmasked: bool, blocks: int) -> Callable[..., Tensor]:
        """The compilation for whole texts: nothing checks how many blocks it is given, nor whether there is a mask."""
        if (unmasked, blocks) not in self.texts:
            self.texts[unmasked, blocks] = _compile(_before_mlp if self.experts else _text)
        return self.texts[unmasked, blocks]

    def over(self, x: Tensor, forward_pass: ForwardPass, memory: Memory, span: tuple[int, int]) -> Tensor:
        """x (B, Q, D) after the blocks, new positions in this span of the memory."""
        cos, sin, mask, _, _, mask_tokens, near, *_ = forward_pass
        assert mask is None or isinstance(mask, Tensor)
        run = self.plain if mask_tokens is None else self._adapted(mask_tokens, x.dtype)
        kept, slot_Q, mask_B1QT = memory.whole(*span, mask)
        cos, sin = (turn.expand(len(x), -1, -1, -1).contiguous() for turn in (cos, sin))  # of one layout, which is not checked either
        near = _of_each_row(near, len(x))
        torch._dynamo.mark_dynamic(mask_B1QT, 3)  # one compilation for memories of any length
        if x.shape[1] > 1:  # and for any number of positions, which guards of x hold together
            gates = [] if mask_tokens is None else [(mask_tokens.gate_BQ1, 1)]
            taps = [(tensor, 1) for tensor in near or ()]
            for tensor, axis in [(x, 1), (cos, 2), (sin, 2), (slot_Q, 0), (mask_B1QT, 2), *gates, *taps]:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        for tensor in itertools.chain.from_iterable(kept):
            if not hasattr(tensor, "_dynamo_dynamic_indices"):
                torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2)
        blocks, gate = list(self), None if mask_tokens is None else mask_tokens.gate_BQ1
        for first in range(0, len(blocks), self.together):
            some = slice(first, first + self.together)
            x = run(blocks[some], x, cos, sin, kept[some], slot_Q, mask_B1QT, gate, near)
        return x

    def _adapted(self, mask_tokens: MaskTokens, dtype: torch.dtype) -> Callable[..., Tensor]:
        """The compilation for this adapter, whose joined matrices it reads as they are now."""
        if mask_tokens.adapter not in self.adapted:
            for fused, layers in fused_layers(self):
                if any(layer.low_rank is not None for layer in layers):
                    fused.join_low_rank(layers, dtype)
            self.adapted[mask_tokens.adapter] = _compile(_over)
        return self.adapted[mask_tokens.adapter]


def _over(
    blocks: Sequence[Block],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    kept: Sequence[tuple[Tensor, Tensor, Tensor]],
    slot_Q: Tensor,
    mask_B1QT: Tensor,
    gate_BQ1: Tensor | None,
    near: Neighbours | None,
) -> Tensor:
    """`Blocks` over the whole memory of a cache, keys, values (B, G, T, K) and conv (B, T, D), of which new ones take these slots.

    mask: added to the scores.
    """
    mask_tokens = None if gate_BQ1 is None else MaskTokens(gate_BQ1, gate_BQ1, False, blocks[0])  # the gate is all that is read
    for block, (k_BGTK, v_BGTK, conv_BTD) in zip(blocks, kept, strict=True):
        attention: Any = block.attention
        read = block.attention_norm(x)
        if block.conv is not None:
            read = block.conv(read, near, conv_BTD.index_copy_(1, slot_Q, read))
        q, *new = attention.heads(read, cos, sin, mask_tokens)
        for kept_BGTK, new_BGQK in zip((k_BGTK, v_BGTK), new, strict=True):
            kept_BGTK.index_copy_(2, slot_Q, new_BGQK)
        one = x.shape[1] == 1 and x.device.type == "cpu"
        read = attend_alone(q, k_BGTK, v_BGTK, mask_B1QT) if one else attention.attend(q, k_BGTK, v_BGTK, mask_B1QT, False)
        x = x + block.dropout(attention.project_out(read, mask_tokens))
        x = x + block.dropout(block.mlp(block.mlp_norm(x), mask_tokens))
    return x


def _text(
    blocks: Sequence[Block],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask_B1QT: Tensor | None,
    near: Neighbours | None,
    level_BC: Tensor | None,
) -> Tensor:
    """`Blocks` over whole texts."""
    for block in blocks:
        x = block(x, ForwardPass(cos, sin, mask_B1QT, neighbours=near, level=level_BC))
    return x


def _before_mlp(
    blocks: Sequence[Block],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask_B1QT: Tensor | None,
    _near: Neighbours | None,
    _level_BC: Tensor | None,
) -> Tensor:
    """Of one block over whole texts, the part before its MLP."""
    (block,) = blocks
    y: Tensor = x + block.attention(block.attention_norm(x), ForwardPass(cos, sin, mask_B1QT))
    return y


def _of_each_row(near: Near, rows: int) -> Neighbours | None:
    """Of one layout, which is not checked."""
    assert not isinstance(near, BesideClean)  # of plain blocks alone
    return near and Neighbours(*(part.expand(rows, -1, -1).contiguous() for part in near))


def attend_alone(q_BH1K: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask_B11T: Tensor) -> Tensor:
    """`attention.attend` for one query, without products: compiled they are two loops, where the kernel takes as long to begin as to read.

    mask: added to the scores.
    """
    q_BGR1K = torch.unflatten(q_BH1K.float() * q_BH1K.shape[-1] ** -0.5, 1, (k_BGTK.shape[1], -1))
    scores_BGRT = (q_BGR1K * k_BGTK[:, :, None]).sum(-1) + mask_B11T
    read_BGRK = (scores_BGRT.softmax(-1)[..., None] * v_BGTK[:, :, None]).sum(-2)
    return read_BGRK.flatten(1, 2)[:, :, None].to(q_BH1K.dtype)


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function over blocks, compiled by itself: another network must not find the code compiled for this one."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=function.__name__)  # torch.compile knows a function by its code
    options: dict[str, Any] = {
        "guard_filter_fn": lambda guards: [g.guard_type == "SHAPE_ENV" or g.name in ("L['x']", "x") for g in guards],
        "size_asserts": False,
    }
    return torch.compile(types.FunctionType(code, function.__globals__), fullgraph=True, options=options)
