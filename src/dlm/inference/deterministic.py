"""Batch-invariant logits: those of a position are bitwise identical however many rows and positions a forward pass has."""

from __future__ import annotations

from typing import cast

from dlm.inference.fused import Product, fuse, linear_parts
from dlm.inference.quantized_linear import RoundedLinear, Shortlist
from dlm.models.block import Block, RMSNorm
from dlm.models.transformer import Transformer

ROWS = 16  # of every product of a deterministic network


def steady(network: Transformer) -> Transformer:
    """Make the logits of a position the same to the bit, however many positions and rows a call has. It costs time: see the docs.

    Every matrix product has `ROWS` rows, and attention sums keys in one order.
    """
    for part, _, _ in linear_parts(fuse(network)):
        part.rows = ROWS
    for block in network.blocks:
        cast(Block, block).attention.steady = True
    for module in network.modules():
        if isinstance(module, Product | RoundedLinear | Shortlist | RMSNorm):
            module.rows = ROWS
    return network
