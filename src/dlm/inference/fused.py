"""A network made ready for decoding, in place: fewer and larger matrix products, weights of few bits, results that no batch changes.

All of it acts where no gradients are recorded; a fused network can still be trained, its weights are where they were. Adapters of
`dlm.adapters.lora` may be attached before or after, but for their files: those name the weights that they were made for, and are loaded
before `quantize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.inference import packed
from dlm.inference.packed import TwoLayouts
from dlm.models.block import Block, in_pieces, rotary, version
from dlm.models.transformer import Transformer

PACKED = {torch.float32: range(3, 257), torch.bfloat16: range(1, 257)}  # rows of a product for which a second layout of its weights pays
MOST = 2**31  # bytes of a network whose weights may so be held twice
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
    for part, joined, single in linear_parts(network):
        part.joined, part.product = _product(part.joined, joined), _product(part.product, [single])
    network.head_product = _product(network.head_product, [network.head])
    packs = may_pack(network, network.embed.weight.dtype)
    for module in network.modules():
        if isinstance(module, Product):
            module.packs = packs
    return network


def may_pack(network: Transformer, dtype: torch.dtype) -> bool:
    """Whether the weights of this network may be held once more, in this type."""
    size = sum(p.numel() for p in network.parameters()) * dtype.itemsize
    return network.device.type == "cpu" and size <= MOST and packed.available(dtype)


def _product(known: Any, layers: list[nn.Linear]) -> Product:
    if isinstance(known, Product) and known.weight.data_ptr() == layers[0].weight.data_ptr():
        return known
    made = Product(layers)
    made.rows = known.rows if isinstance(known, Product) else 0
    return made


def linear_parts(network: Transformer) -> list[tuple[Any, list[nn.Linear], nn.Linear]]:
    """(part of a block, its layers that read the same input, the one that ends it)."""
    parts: list[tuple[Any, list[nn.Linear], nn.Linear]] = []
    for block in network.blocks:
        attention, mlp = cast(Block, block).attention, cast(Block, block).mlp
        parts.append((attention, [attention.q, attention.k, attention.v], attention.out))
        parts.append((mlp, [mlp.up] if mlp.gate is None else [mlp.gate, mlp.up], mlp.down))
    return parts
