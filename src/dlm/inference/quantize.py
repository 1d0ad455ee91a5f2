"""Weights in 8 or 4 bits: a network quantized in place, a quantized copy that drafts, and the head.

Inference only. Adapter files name the weights that they were made for, so an adapter is loaded before `quantize`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from dlm.errors import InputError
from dlm.inference.compiled import compile
from dlm.inference.fused import fuse, linear_parts, may_pack
from dlm.inference.quantized_linear import LINEAR, OUTPUTS, Int4Linear, Int8Linear, RoundedLinear, Shortlist
from dlm.models.block import Block
from dlm.models.transformer import Transformer

BITS = {"int8": 8, "int4": 4}


LARGE = 2**22  # numbers of a head


NEAR = 0.02  # of the weights' size: an error of rounding that sixteen bits of a scale explain


@torch.no_grad()
def quantize(network: Transformer, bits: int = 8) -> Transformer:
    """Round the weights of all blocks to 8 or 4 bits, and the head as `_small_head` does; those of the embedding stay as they are."""
    if network.device.type != "cpu":
        raise ValueError(f"weights of few bits are for the CPU, this network is on {network.device}")
    packs = may_pack(fuse(network), torch.bfloat16)
    for part, joined, single in linear_parts(network):
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
