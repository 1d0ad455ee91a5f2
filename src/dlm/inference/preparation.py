"""One function that prepares a network for decoding, once, when it is loaded."""

from __future__ import annotations

from dlm.errors import InputError
from dlm.inference.compiled import compile
from dlm.inference.deterministic import steady
from dlm.inference.fused import fuse
from dlm.inference.quantize import quantize
from dlm.models.transformer import Transformer


def prepare(network: Transformer, *, bits: int | None = None, batch_invariant: bool = False, compiled: bool = False) -> Transformer:
    """The same network, its modules replaced in place by fused ones; a sampler then changes nothing any more.

    For causal networks that decode. Gradients are still possible, unless the weights are quantized. Adapters whose files name the weights
    are loaded before, those that are made anew may be attached later.
    bits: 8 or 4 quantize the weights (CPU). batch_invariant: logits of a position are bitwise identical in every batch. compiled: blocks
    by torch.compile, for forward passes of few positions. InputError for a network that is batch-invariant and compiled.
    """
    if batch_invariant and compiled:
        raise InputError("a compiled network rounds as its compiler likes: choose deterministic or compiled decoding")
    fuse(network)
    if bits is not None:
        quantize(network, bits)
    if batch_invariant:
        steady(network)
    if compiled:
        compile(network)
    return network
