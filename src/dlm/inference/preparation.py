"""One function that prepares a network for decoding, once, when it is loaded; and the memory that a network then takes."""

from __future__ import annotations

from dlm.errors import InputError
from dlm.inference.compiled import compile
from dlm.inference.deterministic import make_batch_invariant
from dlm.inference.fused import RotaryTable, fuse
from dlm.inference.heap import keep_freed_memory
from dlm.inference.packed import prepacked_bytes
from dlm.inference.quantize import quantize
from dlm.models.transformer import Transformer


def prepare(network: Transformer, *, bits: int | None = None, batch_invariant: bool = False, compiled: bool = False) -> Transformer:
    """The same network, its modules replaced in place by fused ones; a sampler then changes nothing any more.

    Gradients are still possible, unless the weights are quantized. Adapters whose files name the weights are loaded before, those that are
    made anew may be attached later.
    bits: 8 or 4 quantize the weights (CPU). batch_invariant: logits of a position are bitwise identical in every batch, for causal
    networks. compiled: blocks by torch.compile, as `dlm.inference.compiled` says. InputError for a network that is batch-invariant and
    compiled.
    """
    if batch_invariant and compiled:
        raise InputError("a compiled network rounds as its compiler likes: choose deterministic or compiled decoding")
    keep_freed_memory()
    fuse(network)
    if bits is not None:
        quantize(network, bits)
    if batch_invariant:
        make_batch_invariant(network)
    if compiled:
        compile(network)
    return network


def held_bytes(*networks: Transformer) -> int:
    """Memory of the tensors of networks, prepacked weights and tables among them; those that share memory count once."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    tables = [network.rotary.tables.values() for network in networks if isinstance(network.rotary, RotaryTable)]
    tensors += [tensor for table in tables for pair in table for tensor in pair]
    shared = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(shared.values()) + sum(prepacked_bytes(network) for network in networks)
