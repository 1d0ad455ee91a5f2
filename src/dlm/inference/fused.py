"""Fused attention and MLP modules: fewer and larger matrix products, and rotations looked up in a table.

They act where no gradients are recorded. A fused network can still be trained, its weights are where they were. Adapters
(`dlm.adapters.lora`) may be attached before or after.
Shapes: N rows, R ranks of adapters side by side, I and O features in and out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.inference.fixed_rows import FixedRows
from dlm.inference.packed import PrepackedLinear
from dlm.inference.quantized_linear import QuantizedLinear, is_large_head, quantized_head
from dlm.models import elementwise
from dlm.models.block import MLP, Attention, Block, Head, Linear, LowRank, MaskTokens, Rotary
from dlm.models.hardware import prepacked_rows, prepacks
from dlm.models.transformer import Transformer

PREPACK_ROWS = {dtype: prepacked_rows(dtype) for dtype in (torch.float32, torch.bfloat16)}
PREPACK_BYTES = 2**31  # of the largest network whose weights may be held twice
DRAFT_POSITIONS = 256  # after the window, at which draft tokens may stand


class JoinedLinear(PrepackedLinear):
    """Linear layers that read the same input as one product. Their weights become parts of its own, so that none is held twice."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.join(layers)

    weight: Tensor
    bias: Tensor | None

    def join(self, layers: Sequence[Linear]) -> None:
        """Take the weights of these layers, which may have moved or changed their type."""
        self.parts = tuple(layer.weight for layer in layers)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        weights = [part.detach() for part in self.parts]
        self.register_buffer("weight", torch.cat(weights) if len(weights) > 1 else weights[0], persistent=False)
        self.register_buffer("bias", torch.cat([bias.detach() for bias in biases]) if biases else None, persistent=False)
        self.prepacked = None
        for layer, part in zip(layers, torch.split(self.weight, [layer.out_features for layer in layers]), strict=True):
            layer.weight.data = part

    def forward(self, x: Tensor) -> Tensor:
        pays = PREPACK_ROWS.get(x.dtype) if x.dtype == self.weight.dtype else None  # autocast may have cast x alone
        if not self.packs or pays is None or not pays.start <= x.numel() // x.shape[-1] < pays.stop:
            return F.linear(x, self.weight, self.bias)
        return self.prepacked_product(x, len(self.weight), self.bias)

    def dense_weight(self) -> Tensor:
        return self.weight

    def version(self) -> int:
        return _version(self.parts)


class FusedLinear(nn.Module):
    """Linear layers that read the same input, and their adapters, by one product each.

    A product knows no gradients: where those are recorded, the layers are applied one by one, if they still have weights.
    product: a JoinedLinear, a quantized layer, or either in `FixedRows`.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.product: nn.Module = JoinedLinear(layers)
        self._low_rank: tuple[list[LowRank | None], int, Tensor, Tensor] | None = None

    @property
    def joined(self) -> JoinedLinear | None:
        """The product, if the weights are not quantized."""
        product = self.product.inner if isinstance(self.product, FixedRows) else self.product
        return product if isinstance(product, JoinedLinear) else None

    def forward(self, x: Tensor, layers: Sequence[Linear], mask_tokens: MaskTokens | None) -> Sequence[Tensor]:
        """The output of each layer."""
        records = torch.is_grad_enabled()
        if records and layers[0].weight is not None:
            return [layer(x, mask_tokens) for layer in layers]
        y = self.side_by_side(x, layers, None if records else mask_tokens)
        parts = torch.split(y, [layer.out_features for layer in layers], -1) if len(layers) > 1 else [y]
        return [layer.adapt(x, part, mask_tokens) for layer, part in zip(layers, parts, strict=True)] if records else parts

    def side_by_side(self, x: Tensor, layers: Sequence[Linear], mask_tokens: MaskTokens | None) -> Tensor:
        """The outputs of all layers, one after another in the last dimension. Without gradients."""
        self.refresh(layers)
        y: Tensor = self.product(x)
        return y if mask_tokens is None else self._adapt(layers, x, y, mask_tokens)

    def refresh(self, layers: Sequence[Linear]) -> None:
        """Join weights again that were moved apart, by `to` for example."""
        if torch.compiler.is_compiling() or (joined := self.joined) is None:
            return
        if joined.weight.data_ptr() != layers[0].weight.data_ptr():
            joined.join(layers)

    def _adapt(self, layers: Sequence[Linear], x: Tensor, y: Tensor, mask_tokens: MaskTokens) -> Tensor:
        """`Linear.adapt` of all layers, whose outputs stand side by side in y."""
        if all(layer.low_rank is None for layer in layers):
            return y
        if torch.compiler.is_compiling():  # of few positions: all are adapted, which counts at mask tokens
            *_, A_RI, B_OR = cast(tuple[list[LowRank | None], int, Tensor, Tensor], self._low_rank)
            return y + mask_tokens.gate_BQ1.to(y.dtype) * F.linear(F.linear(x, A_RI), B_OR)
        A_RI, B_OR = self.join_low_rank(layers, x.dtype)
        if mask_tokens.alone:
            return y + F.linear(F.linear(x, A_RI), B_OR)
        delta_MO = F.linear(F.linear(x.flatten(0, -2).index_select(0, mask_tokens.index_M), A_RI), B_OR)
        return y.flatten(0, -2).index_add(0, mask_tokens.index_M, delta_MO).view_as(y)

    def join_low_rank(self, layers: Sequence[Linear], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R), scaled, of all adapters at once; kept until one of them changes."""
        each = [layer.low_rank for layer in layers]
        version = _version([matrix for one in each if one is not None for matrix in one[:2]])
        known = self._low_rank
        if known is None or known[1] != version or known[2].dtype != dtype or not _same(known[0], each):
            A_RI = torch.cat([one.A_RI for one in each if one is not None])
            none = [A_RI.new_zeros(layer.out_features, 0) for layer in layers]
            B_OR = torch.block_diag(*(empty if one is None else one.scale * one.B_OR for one, empty in zip(each, none, strict=True)))
            known = self._low_rank = each, version, A_RI.to(dtype), B_OR.to(dtype)
        return known[2:]


def _version(tensors: Sequence[Tensor]) -> int:
    """Another number whenever one of them was changed in place; 0 for those of inference mode, which forbids that."""
    return sum(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def _same(some: Sequence[LowRank | None], others: Sequence[LowRank | None]) -> bool:
    return [one and (id(one.A_RI), id(one.B_OR)) for one in some] == [one and (id(one.A_RI), id(one.B_OR)) for one in others]


class FusedAttention(Attention):
    """`Attention` with one product for q, k and v."""

    def __init__(self, base: Attention) -> None:
        nn.Module.__init__(self)
        self.config, self.layer = base.config, base.layer
        _take_children(self, base)
        self.fused_in, self.fused_out = FusedLinear((self.q, self.k, self.v)), FusedLinear((self.out,))

    def heads(self, x_BQD: Tensor, cos: Tensor, sin: Tensor, mask_tokens: MaskTokens | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As of `Attention`; on a CPU, queries and keys are normed and rotated together."""
        size, queries, keys = self.config.head_dim, self.config.heads, self.config.kv_heads
        norms = (self.q_norm.weight, self.k_norm.weight) if self.config.qk_norm else ()
        together = elementwise.pay(x_BQD) and not torch.is_grad_enabled() and not any(weight.is_meta for weight in norms)
        if not together or cos.shape[-1] != size:
            return super().heads(x_BQD, cos, sin, mask_tokens)
        y_BQO = self.fused_in.side_by_side(x_BQD, (self.q, self.k, self.v), mask_tokens)
        y_BQHK = y_BQO.view(*x_BQD.shape[:2], queries + 2 * keys, size)
        weight_HK = torch.cat([norms[0].expand(queries, -1), norms[1].expand(keys, -1)]) if norms else None
        turned_BQHK = elementwise.turned(
            y_BQHK[:, :, : queries + keys], weight_HK, self.config.norm_eps, cos.transpose(1, 2), sin.transpose(1, 2)
        )
        q, k = turned_BQHK.transpose(1, 2).split((queries, keys), 1)
        return q, k, y_BQHK[:, :, queries + keys :].transpose(1, 2)

    def project_in(self, x_BQD: Tensor, mask_tokens: MaskTokens | None) -> Sequence[Tensor]:
        return cast(Sequence[Tensor], self.fused_in(x_BQD, (self.q, self.k, self.v), mask_tokens))

    def project_out(self, read_BHQK: Tensor, mask_tokens: MaskTokens | None = None) -> Tensor:
        (y_BQD,) = self.fused_out(read_BHQK.transpose(1, 2).flatten(2), (self.out,), mask_tokens)
        return cast(Tensor, y_BQD)


class FusedMLP(MLP):
    """`MLP` with one product for gate and up."""

    def __init__(self, base: MLP) -> None:
        nn.Module.__init__(self)
        self.gate = None
        _take_children(self, base)
        self.fused_in, self.fused_out = FusedLinear(self.inputs), FusedLinear((self.down,))

    def project_in(self, x: Tensor, mask_tokens: MaskTokens | None) -> Sequence[Tensor]:
        return cast(Sequence[Tensor], self.fused_in(x, self.inputs, mask_tokens))

    def project_out(self, hidden: Tensor, mask_tokens: MaskTokens | None) -> Tensor:
        (y,) = self.fused_out(hidden, (self.down,), mask_tokens)
        return cast(Tensor, y)


class FusedHead(Head):
    """`Head` with prepacked weights; a large one drafts with a quantized copy of itself, made when it is first wanted.

    tied: whether the embedding holds the same weights.
    """

    def __init__(self, base: Head, *, tied: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.tied = base.weight, tied
        self.bias = base.bias
        self.fused = FusedLinear((self,))
        self.draft_copy: nn.Module | None = None
        self._copied = -1  # version of the weights that the copy was made of

    def forward(self, x: Tensor, mask_tokens: MaskTokens | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        (logits,) = self.fused(x, (self,), None)
        return cast(Tensor, logits)

    def draft(self, hidden: Tensor) -> Tensor:
        if not is_large_head(self.weight) or hidden.device.type != "cpu":
            return super().draft(hidden)
        version = _version([self.weight])
        if self.draft_copy is None or self._copied != version:
            self.draft_copy, self._copied = quantized_head(self.weight, self.bias, tied=self.tied), version
        logits: Tensor = self.draft_copy(hidden)
        return logits


class RotaryTable(Rotary):
    """`Rotary` that looks up cos and sin of every position, computed once for each device."""

    def __init__(self, base: Rotary) -> None:
        super().__init__(base.config)
        self.tables: dict[torch.device, tuple[Tensor, Tensor]] = {}  # (T, K)

    def forward(self, pos_BQ: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.tables.get(pos_BQ.device) or self._make(pos_BQ.device)
        return cos[pos_BQ][:, None], sin[pos_BQ][:, None]

    def _make(self, device: torch.device) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(torch.arange(self.config.window + DRAFT_POSITIONS, device=device)[None])
        self.tables[device] = cos[0, 0], sin[0, 0]
        return self.tables[device]


def _take_children(made: nn.Module, base: nn.Module) -> None:
    for name, child in base.named_children():
        setattr(made, name, child)
    made.train(base.training)


def fuse(network: Transformer) -> Transformer:
    """Replace attention, MLP, head and rotations by fused ones, in place. The logits stay the same, up to the order of sums.

    A network that is fused already stays as it is; weights that were moved apart are joined again.
    """
    if not isinstance(network.rotary, RotaryTable):
        network.rotary = RotaryTable(network.rotary)
    for block in network.blocks:
        fuse_block(block)
    if isinstance(network.head, Head) and not isinstance(network.head, FusedHead):
        network.head = FusedHead(network.head, tied=network.head.weight.data_ptr() == network.embed.weight.data_ptr())
    packs = may_prepack(network, network.embed.weight.dtype)
    for fused, layers in fused_layers(network):
        fused.refresh(layers)
        if fused.joined is not None:
            fused.joined.packs = packs
    return network


def fuse_block(block: Block) -> None:
    """Replace attention and MLP of a block, or the MLPs of its experts, by fused ones, in place."""
    if not isinstance(block.attention, FusedAttention):
        block.attention = FusedAttention(block.attention)
    for module in list(block.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MLP) and not isinstance(child, FusedMLP):
                setattr(module, name, FusedMLP(child))


def may_prepack(network: Transformer, dtype: torch.dtype) -> bool:
    """Whether the weights of this network may be held a second time, in this type."""
    quantized = sum(m.in_features * m.out_features for m in network.modules() if isinstance(m, QuantizedLinear))
    size = (sum(p.numel() for p in network.parameters()) + quantized) * dtype.itemsize
    return network.device.type == "cpu" and size <= PREPACK_BYTES and prepacks(dtype)


def fused_layers(network: nn.Module) -> Iterator[tuple[FusedLinear, tuple[Linear, ...]]]:
    """Every fused product in a network or some of its blocks, with its layers."""
    for module in network.modules():
        if isinstance(module, FusedAttention):
            yield module.fused_in, (module.q, module.k, module.v)
            yield module.fused_out, (module.out,)
        if isinstance(module, FusedMLP):
            yield module.fused_in, module.inputs
            yield module.fused_out, (module.down,)
        if isinstance(module, FusedHead):
            yield module.fused, (module,)
