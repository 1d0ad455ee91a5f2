"""A network made ready for decoding, in place: fewer and larger matrix products, weights of few bits, results that no batch changes.

All of it acts where no gradients are recorded; a fused network can still be trained, its weights are where they were. Adapters of
`dlm.convert.lora` may be attached before or after, but for their files: those name the weights that they were made for, and are loaded
before `quantize`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import types
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.errors import InputError
from dlm.models import layout
from dlm.models.block import Block, RMSNorm, in_pieces, rotary, version
from dlm.models.cache import Memory
from dlm.models.layout import TwoLayouts
from dlm.models.quantized import LINEAR, OUTPUTS, Int4Linear, Int8Linear, RoundedLinear, Shortlist
from dlm.models.transformer import Transformer

BITS = {"int8": 8, "int4": 4}
PACKED = {torch.float32: range(3, 257), torch.bfloat16: range(1, 257)}  # rows of a product for which a second layout of its weights pays
MOST = 2**31  # bytes of a network whose weights may so be held twice
LARGE = 2**22  # numbers of a head
NEAR = 0.02  # of the weights' size: an error of rounding that sixteen bits of a scale explain
ROWS = 16  # of every product of a deterministic network
TOGETHER = 5  # blocks that are compiled as one at most: starting a graph takes time, compiling a large one far more
BEYOND = 256  # positions after the window that proposals may stand at


class Product(TwoLayouts):
    """The product of one or more layers that read the same input. Their weights are parts of its own, so that none is held twice."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.rows = 0  # of `in_pieces`
        self.parts = tuple(layer.weight for layer in layers)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        weights = [part.detach() for part in self.parts]
        self.register_buffer("weight", torch.cat(weights) if len(weights) > 1 else weights[0], persistent=False)
        self.register_buffer("bias", torch.cat([bias.detach() for bias in biases]) if biases else None, persistent=False)
        for layer, part in zip(layers, torch.split(self.weight, [layer.out_features for layer in layers]), strict=True):
            layer.weight.data = part

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(self._product, x, self.rows)

    def _product(self, x: Tensor) -> Tensor:
        pays = PACKED.get(x.dtype)
        if not self.packs or pays is None or not pays.start <= x.numel() // x.shape[-1] < pays.stop:
            return F.linear(x, self.weight, self.bias)
        return self.second(x, len(self.weight), self.bias)

    def written_out(self) -> Tensor:
        return self.weight

    def version(self) -> int:
        return version(self.parts)


def fuse(network: Transformer) -> Transformer:
    """Join q, k and v, and gate and up; look rotations up. The logits stay what they were, up to rounding.

    On a network that is fused: joins anew what was moved apart by `to`.
    """
    config = network.config
    if network.turns is None or network.turns[0].device != network.device:
        pos_1T = torch.arange(config.window + BEYOND, device=network.device)[None]
        cos, sin = rotary(pos_1T, config.head_dim, config.rope_base, config.rope_scaling)
        network.turns = (cos[0, 0], sin[0, 0])
    if network.quantized:
        return network
    for part, joined, single in _parts(network):
        part.joined, part.product = _product(part.joined, joined), _product(part.product, [single])
    network.head_product = _product(network.head_product, [network.head])
    packs = _packs(network, network.embed.weight.dtype)
    for module in network.modules():
        if isinstance(module, Product):
            module.packs = packs
    return network


def _packs(network: Transformer, dtype: torch.dtype) -> bool:
    """Whether the weights of this network may be held once more, in this type."""
    size = sum(p.numel() for p in network.parameters()) * dtype.itemsize
    return network.device.type == "cpu" and size <= MOST and layout.available(dtype)


def _product(known: Any, layers: list[nn.Linear]) -> Product:
    if isinstance(known, Product) and known.weight.data_ptr() == layers[0].weight.data_ptr():
        return known
    made = Product(layers)
    made.rows = known.rows if isinstance(known, Product) else 0
    return made


@torch.no_grad()
def quantize(network: Transformer, bits: int = 8) -> Transformer:
    """Round the weights of all blocks to 8 or 4 bits, and the head as `_small_head` does; those of the embedding stay as they are."""
    if network.device.type != "cpu":
        raise ValueError(f"weights of few bits are for the CPU, this network is on {network.device}")
    packs = _packs(fuse(network), torch.bfloat16)
    for part, joined, single in _parts(network):
        part.joined = LINEAR[bits](part.joined.weight, part.joined.bias)
        part.product = LINEAR[bits](single.weight, single.bias)
        for layer in (*joined, single):  # what they say is part of a product now; an adapter on them is still theirs
            layer.register_parameter("weight", None)
            layer.register_parameter("bias", None)
    network.head, network.head_product = cast(Any, _small_head(network)), None
    for module in network.modules():
        if isinstance(module, RoundedLinear):
            module.packs = packs
    network.quantized = True
    return network


def _small_head(network: Transformer) -> nn.Module:
    """The head in four bits, its best tokens exactly, if it is large and the embedding keeps its weights anyway; else in eight bits."""
    weight_VD, kept_VD = network.head.weight, network.embed.weight
    tied = weight_VD.data_ptr() == kept_VD.data_ptr() and weight_VD.numel() >= LARGE
    return Shortlist(weight_VD) if tied else Int8Linear(weight_VD)


def coarsen(network: Transformer) -> None:
    """Give a large head a copy of few bits to read guesses out with, where reading it is what they cost."""
    if network.coarse is None and network.device.type == "cpu" and not network.quantized and network.head.weight.numel() >= LARGE:
        network.coarse = _small_head(network)


def worth_rounding(network: Transformer) -> str:
    """What a copy of this network that drafts for it is best rounded to: `int4` where four bits say what the weights are, as they do of
    those that came in four, else `int8`; nothing for a network that is small, rounded already, or not on a CPU."""
    if network.quantized or network.device.type != "cpu" or network.head.weight.numel() < LARGE:
        return ""
    weight_OI = cast(Block, network.blocks[0]).mlp.up.weight.detach()[:OUTPUTS].float()
    error = Int4Linear(weight_OI).written_out()[: len(weight_OI), : weight_OI.shape[1]].float() - weight_OI
    return "int4" if error.norm() < NEAR * weight_OI.norm() else "int8"


def rounded_copy(network: Transformer, bits: int) -> Transformer:
    """One with `quantize`d weights, without the adapter, compiled where the network is; the embedding is held once."""
    if network.quantized:
        raise InputError("the weights are rounded already: there is nothing to round for a draft")
    if network.device.type != "cpu":
        raise InputError("int8 and int4 are for the CPU: draft with another model, or with heads or masks")
    with torch.device("meta"):
        copy = Transformer(network.config)
    copy.load_state_dict(network.state_dict(), assign=True)
    quantize(copy.eval().requires_grad_(False), bits)
    return compile(copy) if network.compiled is not None else copy


def steady(network: Transformer) -> Transformer:
    """Make the logits of a position the same to the bit, however many positions and rows a call has. It costs time: see the docs.

    Every matrix product has `ROWS` rows, and attention sums keys in one order.
    """
    for part, _, _ in _parts(fuse(network)):
        part.rows = ROWS
    for block in network.blocks:
        cast(Block, block).attention.steady = True
    for module in network.modules():
        if isinstance(module, Product | RoundedLinear | Shortlist | RMSNorm):
            module.rows = ROWS
    return network


def compile(network: Transformer) -> Transformer:
    """Compile the blocks for calls of decoding, of few positions: most of their time goes into many small operations.

    The first call of a shape then takes seconds. The weights and the adapter have to stay as they are from here on: nothing but the
    shape of the input is checked before a compiled block is used, since a check of everything costs as much as it saves.
    """
    if network.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise InputError("a network is compiled with a C++ compiler, and there is none: install g++, or decode without compiling")
    network.compiled = CompiledBlocks(len(network.blocks))
    return fuse(network)


class CompiledBlocks:
    """All blocks of one network over a cache. An adapter that acts has a compilation of its own, for nothing else tells them apart."""

    def __init__(self, layers: int) -> None:
        self.options: dict[str, Any] = {
            "guard_filter_fn": lambda guards: [g.guard_type == "SHAPE_ENV" or g.name in ("L['x']", "x") for g in guards],
            "size_asserts": False,
        }
        self.made: dict[Any, Any] = {}
        self.together = next(n for n in range(TOGETHER, 0, -1) if layers % n == 0)  # no graph is made for a rest

    def __call__(
        self, network: Transformer, x: Tensor, cos: Tensor, sin: Tensor, memory: Memory, span: tuple[int, int], mask: Tensor | None
    ) -> Tensor:
        """x after them, new positions in this span of the memory."""
        adapter = network.adapter if network.adapter is not None and network.adapter.masks_M is not None else None
        if adapter not in self.made:
            self.made[adapter] = torch.compile(_own(_over), fullgraph=True, options=self.options)
        kept, slot_Q, mask_B1QT = memory.whole(*span, mask)
        cos, sin = (turn.expand(len(x), -1, -1, -1).contiguous() for turn in (cos, sin))  # of one layout, which is not checked either
        torch._dynamo.mark_dynamic(mask_B1QT, 3)  # one compilation for memories of any length
        if x.shape[1] > 1:  # and for any number of positions, which guards of x hold together
            gates = [] if adapter is None else [(adapter.gate_BQ1, 1)]
            for tensor, axis in [(x, 1), (cos, 2), (sin, 2), (slot_Q, 0), (mask_B1QT, 2), *gates]:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        for tensor in itertools.chain.from_iterable(kept):
            if not hasattr(tensor, "_dynamo_dynamic_indices"):
                torch._dynamo.mark_dynamic(tensor, 2)
        blocks = list(network.blocks)
        for first in range(0, len(blocks), self.together):
            some = slice(first, first + self.together)
            x = self.made[adapter](blocks[some], x, cos, sin, kept[some], slot_Q, mask_B1QT)
        return x


def _over(
    blocks: Sequence[Block], x: Tensor, cos: Tensor, sin: Tensor, kept: Sequence[tuple[Tensor, Tensor]], slot_Q: Tensor, mask_B1QT: Tensor
) -> Tensor:
    for block, own in zip(blocks, kept, strict=True):
        x = block.over(x, cos, sin, own, slot_Q, mask_B1QT)
    return x


def _own(function: Any) -> Any:
    """A copy with code of its own, by which torch.compile knows it: another network must not find what was compiled for this one."""
    return types.FunctionType(function.__code__.replace(co_name=function.__name__), function.__globals__)


def _parts(network: Transformer) -> list[tuple[Any, list[nn.Linear], nn.Linear]]:
    """(part of a block, its layers that read the same input, the one that ends it)."""
    parts: list[tuple[Any, list[nn.Linear], nn.Linear]] = []
    for block in network.blocks:
        attention, mlp = cast(Block, block).attention, cast(Block, block).mlp
        parts.append((attention, [attention.q, attention.k, attention.v], attention.out))
        parts.append((mlp, [mlp.up] if mlp.gate is None else [mlp.gate, mlp.up], mlp.down))
    return parts
