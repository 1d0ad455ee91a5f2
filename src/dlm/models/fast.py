"""A network made ready for decoding, in place: fewer and larger matrix products, eight-bit weights, results that no batch changes.

All of it acts where no gradients are recorded; a fused network can still be trained, its weights are where they were. Adapters of
`dlm.convert.lora` may be attached before or after, but for their files: those name the weights that they were made for, and are loaded
before `quantize`.
"""

from __future__ import annotations

import os
import shutil
import types
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.errors import InputError
from dlm.models.block import Block, RMSNorm, in_pieces, rotary, version
from dlm.models.quantized import Int8Linear
from dlm.models.transformer import Transformer

PACKED = range(3, 65)  # rows of a product in float32 on a CPU for which a second layout of its weights pays: 4 then cost little more than 1
MOST = 2**31  # bytes of a network whose weights may so be held twice
ROWS = 16  # of every product of a deterministic network
BEYOND = 256  # positions after the window that proposals may stand at


class Product(nn.Module):
    """The product of one or more layers that read the same input. Their weights are parts of its own, so that none is held twice."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.rows = 0  # of `in_pieces`
        self.packs, self.parts = False, tuple(layer.weight for layer in layers)
        self.packed: tuple[Tensor, int] | None = None  # and the version of the parts that it was made of
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
        if torch.compiler.is_compiling() or not self.packs or x.numel() // x.shape[-1] not in PACKED or x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        if self.packed is None or self.packed[1] != version(self.parts):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS), version(self.parts)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed[0], self.bias, "none", [], "")
        return y


def second_layout(module: nn.Module) -> list[Tensor]:
    """The weights that a product holds once more."""
    return [module.packed[0]] if isinstance(module, Product) and module.packed is not None else []


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
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    packs = network.device.type == "cpu" and size <= MOST and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    for module in network.modules():
        if isinstance(module, Product):
            module.packs = packs and module.weight.dtype == torch.float32
    return network


def _product(known: Any, layers: list[nn.Linear]) -> Product:
    if isinstance(known, Product) and known.weight.data_ptr() == layers[0].weight.data_ptr():
        return known
    made = Product(layers)
    made.rows = known.rows if isinstance(known, Product) else 0
    return made


@torch.no_grad()
def quantize(network: Transformer) -> Transformer:
    """Round the weights of all blocks and of the head to int8; those of the embedding, which are only looked up, stay."""
    if network.device.type != "cpu":
        raise ValueError(f"int8 is for the CPU, this network is on {network.device}")
    for part, joined, single in _parts(fuse(network)):
        part.joined = Int8Linear(part.joined.weight, part.joined.bias)
        part.product = Int8Linear(single.weight, single.bias)
        for layer in (*joined, single):  # what they say is part of a product now; an adapter on them is still theirs
            layer.register_parameter("weight", None)
            layer.register_parameter("bias", None)
    network.head, network.head_product = cast(Any, Int8Linear(network.head.weight)), None
    network.quantized = True
    return network


def steady(network: Transformer) -> Transformer:
    """Make the logits of a position the same to the bit, however many positions and rows a call has. It costs time: see the docs.

    Every matrix product has `ROWS` rows, and attention sums keys in one order. Integer products need no help.
    """
    for part, _, _ in _parts(fuse(network)):
        part.rows = ROWS
    for module in network.modules():
        if isinstance(module, Product):
            module.rows = ROWS
    for block in network.blocks:
        cast(Block, block).attention.steady = True
    for module in network.modules():
        if isinstance(module, RMSNorm):
            module.rows = ROWS
    return network


def compile(network: Transformer) -> Transformer:
    """Compile what lies between attention and attention, for calls of decoding: most of their time goes into many small operations.

    The first call of a shape then takes seconds. The weights and the adapter have to stay as they are from here on: nothing but the
    shape of the input is checked before a compiled block is used, since a check of everything costs as much as it saves.
    """
    if network.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise InputError("a network is compiled with a C++ compiler, and there is none: install g++, or decode without compiling")
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [g.guard_type == "SHAPE_ENV" or g.name in ("L['x']", "x") for g in guards]}
    network.ends = tuple(torch.compile(_own(half), fullgraph=True, options=options) for half in (Block.before, Block.after))
    return fuse(network)


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
