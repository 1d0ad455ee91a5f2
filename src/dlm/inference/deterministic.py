"""Batch-invariant logits: those of a position are bitwise identical however many rows and positions a forward pass has.

Matrix products and norms see the same number of rows in every forward pass, and attention sums keys in one order.
Shapes: B batch, H heads, G key-value heads, Q queries, T keys, K head dimension, R heads that share keys, N blocks of keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.inference.fixed_rows import FixedRows, fixed_rows
from dlm.inference.fused import FusedLinear, fuse
from dlm.inference.quantized_linear import QuantizedHead
from dlm.models.attention import FlexMask, Mask, Tiles
from dlm.models.block import MLP, Attend, RMSNorm
from dlm.models.transformer import Transformer


def make_batch_invariant(network: Transformer) -> Transformer:
    """Replace every module whose result depends on the batch, in place. It costs time: see the docs."""
    for module in list(fuse(network).modules()):
        for name, child in module.named_children():
            if type(child) is RMSNorm:
                setattr(module, name, BatchInvariantRMSNorm(child))
            elif type(child) is Attend:
                setattr(module, name, BatchInvariantAttend(child.config))
        if isinstance(module, FusedLinear | QuantizedHead) and not isinstance(module.product, FixedRows):
            module.product = FixedRows(module.product)
        if isinstance(module, MLP) and not isinstance(module.silu, FixedRows):
            module.silu = FixedRows(module.silu)
    return network


class BatchInvariantRMSNorm(RMSNorm):
    """`RMSNorm` that sees the same number of rows in every forward pass."""

    def __init__(self, base: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps, self.elementwise_affine = base.normalized_shape, base.eps, base.elementwise_affine
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        return fixed_rows(super().forward, x)


class BatchInvariantAttend(Attend):
    """`Attend` by `attend_steadily`."""

    def forward(self, q_BHQK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: Mask, is_causal: bool) -> Tensor:
        if isinstance(mask, FlexMask):
            raise ValueError("FlexAttention is not batch-invariant: use backend='sdpa'")
        assert not isinstance(mask, Tiles)  # plain attention alone is handed some
        return attend_steadily(q_BHQK, k_BGTK, v_BGTK, mask, is_causal)


def attend_steadily(
    q_BHQK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: Tensor | None, is_causal: bool, *, queries: int = 16, keys: int = 64
) -> Tensor:
    """`attention.attend`, bitwise identical for a query whatever other queries and however many keys that it does not read there are.

    Matrix products have one shape, `queries` by `keys`; sums over keys go block by block from the left, and keys not read add zeros.
    """
    (batch, _, asked, dim), (_, groups, held, _), dtype = q_BHQK.shape, k_BGTK.shape, q_BHQK.dtype
    reads_BQT = torch.ones(batch, asked, held, dtype=torch.bool, device=q_BHQK.device)
    if is_causal:
        reads_BQT = reads_BQT.tril()
    elif mask is not None:
        mask_BQT = mask[:, 0].expand_as(reads_BQT)
        reads_BQT = mask_BQT if mask.dtype == torch.bool else mask_BQT == 0
    reads_BQT = F.pad(reads_BQT, (0, -held % keys, 0, -asked % queries))
    k_BGNTK, v_BGNTK = (torch.unflatten(F.pad(x.float(), (0, 0, 0, -held % keys)), 2, (-1, keys)) for x in (k_BGTK, v_BGTK))
    q_BGRQK = torch.unflatten(F.pad(q_BHQK.float() * dim**-0.5, (0, 0, 0, -asked % queries)), 1, (groups, -1))
    found = []
    for piece_BGRQK, reads in zip(torch.split(q_BGRQK, queries, 3), torch.split(reads_BQT, queries, 1), strict=True):
        blocked_BNQT = ~torch.unflatten(reads, 2, (-1, keys)).transpose(1, 2)
        # a dimension of rows for all the heads that share keys
        scores = piece_BGRQK.flatten(2, 3)[:, :, None] @ k_BGNTK.transpose(-1, -2)
        scores = torch.unflatten(scores, 3, (-1, queries)).masked_fill(blocked_BNQT[:, None, :, None], -torch.inf)
        best = scores.amax((2, 5), keepdim=True)
        weights = (scores - best.nan_to_num(neginf=0.0)).exp()
        sums = weights.sum(-1, keepdim=True)
        values = torch.unflatten(weights.flatten(3, 4) @ v_BGNTK, 3, (-1, queries))
        total, value = sums[:, :, 0], values[:, :, 0]
        for block in range(1, sums.shape[2]):
            total, value = total + sums[:, :, block], value + values[:, :, block]
        found.append((value / total).flatten(1, 2))
    return torch.cat(found, 2)[:, :, :asked].to(dtype)
