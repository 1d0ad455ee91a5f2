"""Networks with quantized weights: one quantized in place, and a quantized copy that drafts for its own network.

Inference only. Adapter files name the weights that they were made for, so an adapter is loaded before `quantize`.
"""

from __future__ import annotations

import torch

from dlm.errors import InputError
from dlm.inference.compiled import CompiledBlocks, compile
from dlm.inference.fused import FusedHead, fuse, fuse_block, fused_layers, may_prepack
from dlm.inference.quantized_linear import (
    LINEAR,
    OUTPUTS,
    Int4Linear,
    QuantizedHead,
    QuantizedLinear,
    is_large_head,
    quantized_head,
)
from dlm.models.block import Block
from dlm.models.meta import without_weights
from dlm.models.transformer import Transformer

BITS = {"int8": 8, "int4": 4}
INT4_ERROR = 0.02  # of the weights' norm: a quantization error that sixteen bits of scale and offset explain


@torch.no_grad()
def quantize(network: Transformer, bits: int = 8) -> Transformer:
    """Quantize the weights of all blocks to 8 or 4 bits and the head as `quantized_head` does, in place; the embedding stays as it is."""
    if network.device.type != "cpu":
        raise ValueError(f"weights of few bits are for the CPU, this network is on {network.device}")
    fuse(network)
    for block in network.blocks:
        _quantize_block(block, bits)
    if isinstance(network.head, FusedHead):
        network.head = QuantizedHead(quantized_head(network.head.weight, network.head.bias, tied=network.head.tied))  # type: ignore[assignment]
    packs = may_prepack(network, torch.bfloat16)
    for module in network.modules():
        if isinstance(module, QuantizedLinear):
            module.packs = packs
    return network


@torch.no_grad()
def quantize_part(network: Transformer, part: str, bits: int) -> None:
    """Quantize one block, `blocks.N`, or a head of its own, `head`, while the weights of others are still on disk; then `quantize`."""
    if part == "head":
        network.head = QuantizedHead(quantized_head(network.head.weight, network.head.bias, tied=False))  # type: ignore[assignment]
    else:
        block = network.blocks[int(part.partition(".")[2])]
        assert isinstance(block, Block)
        fuse_block(block)
        _quantize_block(block, bits)


def _quantize_block(block: Block, bits: int) -> None:
    for fused, layers in list(fused_layers(block)):
        if fused.joined is None:
            continue
        fused.product = LINEAR[bits](fused.joined.weight, fused.joined.bias)
        for layer in layers:  # their outputs are parts of a product now; an adapter on them is still theirs
            layer.register_parameter("weight", None)
            layer.register_parameter("bias", None)


def _is_spread(network: Transformer) -> bool:
    return any(tensor.is_meta for tensor in network.parameters())


def draft_dtype(network: Transformer) -> str:
    """The dtype of a quantized copy that drafts for this network: `int4` where four bits reproduce the weights, as they do for those that
    came in four, else `int8`; nothing for a network that is small, quantized already, or not on a CPU."""
    if network.quantized or network.device.type != "cpu" or _is_spread(network) or not is_large_head(network.head.weight):
        return ""
    weight_OI = network.get_parameter("blocks.0.mlp.up.weight").detach()[:OUTPUTS].float()
    error = Int4Linear(weight_OI).dense_weight()[: len(weight_OI), : weight_OI.shape[1]].float() - weight_OI
    return "int4" if error.norm() < INT4_ERROR * weight_OI.norm() else "int8"


def quantized_copy(network: Transformer, bits: int) -> Transformer:
    """A copy with `quantize`d weights, without the adapter, compiled if the network is; the embedding is held once. InputError for a
    network whose weights are quantized already, or that is not in memory as a whole."""
    if network.quantized:
        raise InputError("the weights are quantized already: there is nothing to quantize for a draft")
    if network.device.type != "cpu":
        raise InputError("int8 and int4 are for the CPU: draft with another model, or with heads or masks")
    if _is_spread(network):
        raise InputError("weights that device_map spreads are not all in memory to be quantized: draft with another model, or with ngram")
    with without_weights():
        copy = Transformer(network.config)
    copy.load_state_dict(network.state_dict(), assign=True)
    quantize(copy.eval().requires_grad_(False), bits)
    return compile(copy) if isinstance(network.blocks, CompiledBlocks) else copy
