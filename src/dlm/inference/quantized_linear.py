"""Weights quantized to eight or four bits for the CPU, by torch's own kernels; activations stay in bfloat16.

Eight bits: a scale for each output. Four: a scale and an offset for every `GROUP` weights of an output, as in GGUF's Q4_1. Weights which
came in that form or in Q4_0 are reproduced, each one exactly but for the sixteen bits of its scale and offset.
Shapes: I and O features in and out, G groups, N rows.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.inference.packed import PrepackedLinear
from dlm.models.block import MaskTokens

GROUP = 32  # weights that share a scale: the least that the kernel knows
REPRODUCED = 1 / 16  # of the squared error with levels at both ends: a smaller one with a level at 0 is of weights that had it before
ROWS_AT_ONCE = 1024  # outputs that are quantized together, to bound the memory that it takes; packed codes lie in blocks of 64
OUTPUTS = 16  # the kernels want a multiple of these, and of `GROUP` inputs
LARGE_HEAD_WEIGHTS = 2**22  # numbers, from which on a head is a large part of a forward pass


class QuantizedLinear(PrepackedLinear):
    """y = W x + b with W in a few bits. Only for inference, and only on a CPU.

    For more than a few rows W is read in bfloat16: prepacked, or where memory is short dequantized each time.
    """

    kernel_rows: ClassVar[int]  # rows up to which the kernel of few bits pays, beside prepacked weights
    kernel_rows_alone: ClassVar[int]  # and beside dequantized ones

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().float(), persistent=False)
        self.pads = -self.in_features % GROUP, -self.out_features % OUTPUTS
        weight_OI = weight_OI.detach()
        weight_OI = F.pad(weight_OI, (0, self.pads[0], 0, self.pads[1])) if any(self.pads) else weight_OI
        # one buffer for all rows: freed and allocated again and again, large ones leave holes in the heap
        buffer_OI = torch.empty(min(ROWS_AT_ONCE, len(weight_OI)), weight_OI.shape[1])
        kept: list[Tensor] = []
        for first in range(0, len(weight_OI), ROWS_AT_ONCE):
            piece = weight_OI[first : first + ROWS_AT_ONCE]
            parts = self.quantize(buffer_OI[: len(piece)].copy_(piece))
            kept = kept or [part.new_empty(len(weight_OI), *part.shape[1:]) for part in parts]
            for whole, part in zip(kept, parts, strict=True):
                whole[first : first + ROWS_AT_ONCE] = part
        self.keep(*kept)

    bias: Tensor | None

    def quantize(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """Some rows, float32 and overwritten, in fewer bits: the buffers that hold them."""
        raise NotImplementedError

    def keep(self, *buffers: Tensor) -> None:
        """Register the buffers of all rows."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x_NI = x.flatten(0, -2).bfloat16()
        if self.pads[0]:
            x_NI = F.pad(x_NI, (0, self.pads[0]))
        if len(x_NI) <= (self.kernel_rows if self.packs else self.kernel_rows_alone):
            y_NO = self.kernel_product(x_NI)
        elif self.packs:
            y_NO = self.prepacked_product(x_NI, self.out_features + self.pads[1])
        else:
            y_NO = F.linear(x_NI, self.dense_weight())
        if self.pads[1]:
            y_NO = y_NO[:, : self.out_features]
        y_NO = y_NO.to(x.dtype) if self.bias is None else (y_NO + self.bias).to(x.dtype)
        return y_NO.view(*x.shape[:-1], self.out_features)

    def kernel_product(self, x_NI: Tensor) -> Tensor:
        """W x by the kernel of few bits, bfloat16 (N, O)."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """W dequantized, in bfloat16."""
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    kernel_rows, kernel_rows_alone = 1, 16

    def quantize(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        low_O, high_O = torch.aminmax(weight_OI, dim=1)
        scale_O = (torch.maximum(-low_O, high_O) / 127).clamp(min=1e-12).bfloat16()
        return scale_O, weight_OI.div_(scale_O.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)

    def keep(self, *buffers: Tensor) -> None:
        for name, buffer in zip(("scale", "weight"), buffers, strict=True):
            self.register_buffer(name, buffer, persistent=False)

    weight: Tensor
    scale: Tensor

    def kernel_product(self, x_NI: Tensor) -> Tensor:
        y_NO: Tensor = torch.ops.aten._weight_int8pack_mm(x_NI, self.weight, self.scale)
        return y_NO

    def dense_weight(self) -> Tensor:
        return self.weight.bfloat16() * self.scale[:, None]


class Int4Linear(QuantizedLinear):
    kernel_rows, kernel_rows_alone = 6, 64

    def quantize(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        weight_OGI = torch.unflatten(weight_OI, 1, (-1, GROUP))
        low_OG1, high_OG1 = torch.aminmax(weight_OGI, dim=-1, keepdim=True)
        span_OG1 = ((high_OG1 - low_OG1) / 15).clamp(min=1e-12)
        extreme_OG1 = torch.where(high_OG1 > -low_OG1, high_OG1, low_OG1) / -8
        # as Q4_1, both ends are levels; of a file of Q4_0, 0 and the end that is farther from it are
        ends = self._codes(weight_OGI, span_OG1, low_OG1 + 8 * span_OG1)
        zero = self._codes(weight_OGI, torch.where(extreme_OG1.abs() < 1e-12, 1e-12, extreme_OG1), torch.zeros_like(span_OG1))
        code_OGI, scale_OG1, offset_OG1 = (
            torch.where(zero[0] < ends[0] * REPRODUCED, *pair) for pair in zip(zero[1:], ends[1:], strict=True)
        )
        code_OI = code_OGI.flatten(1)
        # the kernel has a layout of its own, which only it can read
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code_OI.int(), 2)
        return packed, torch.cat([scale_OG1, offset_OG1], -1), code_OI[:, ::2] | code_OI[:, 1::2] << 4

    @staticmethod
    def _codes(weight_OGI: Tensor, scale_OG1: Tensor, offset_OG1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Squared errors of the groups (O, G, 1), the nearest codes, uint8, and scale and value of code 8 in bfloat16."""
        scale_OG1, offset_OG1 = scale_OG1.bfloat16(), offset_OG1.bfloat16()
        level_OGI = (weight_OGI - offset_OG1).div_(scale_OG1).round_().clamp_(-8, 7)
        code_OGI = (level_OGI + 8).to(torch.uint8)
        error_OG1 = level_OGI.mul_(scale_OG1).add_(offset_OG1).sub_(weight_OGI).square_().sum(-1, keepdim=True)
        return error_OG1, code_OGI, scale_OG1, offset_OG1

    def keep(self, *buffers: Tensor) -> None:
        packed, scale_OG2, codes = buffers
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale_GO2", scale_OG2.transpose(0, 1).contiguous(), persistent=False)
        self.register_buffer("codes", codes, persistent=False)

    packed: Tensor
    scale_GO2: Tensor
    codes: Tensor

    def kernel_product(self, x_NI: Tensor) -> Tensor:
        y_NO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI, self.packed, GROUP, self.scale_GO2)
        return y_NO

    def dense_weight(self) -> Tensor:
        code_OI = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1)
        scale_OG1, offset_OG1 = self.scale_GO2.transpose(0, 1)[..., None].unbind(2)
        weight_OGI = torch.unflatten(code_OI.bfloat16() - 8, 1, (-1, GROUP)) * scale_OG1 + offset_OG1
        return weight_OGI.flatten(1)


class Shortlist(nn.Module):
    """y = W x with W in four bits, but for the greatest outputs of each row, which are computed again with W as it is.

    For a large head: the ratios among the likeliest tokens' probabilities are exact, those of the others approximate.
    """

    def __init__(self, weight_OI: Tensor, best: int = 256) -> None:
        super().__init__()
        self.coarse, self.best = Int4Linear(weight_OI), min(best, len(weight_OI))
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("weight", weight_OI.detach(), persistent=False)

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.coarse(x)
        best = y.topk(self.best, -1, sorted=False).indices
        return y.scatter_(-1, best, (F.embedding(best, self.weight) @ x[..., None]).squeeze(-1).to(y.dtype))


LINEAR = {8: Int8Linear, 4: Int4Linear}  # by bits


class QuantizedHead(nn.Module):
    """`dlm.models.block.Head` with quantized weights, which also draft."""

    def __init__(self, product: nn.Module) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor, mask_tokens: MaskTokens | None = None) -> Tensor:
        logits: Tensor = self.product(x)
        return logits

    def draft(self, hidden: Tensor) -> Tensor:
        return self.forward(hidden)


def is_large_head(weight_VD: Tensor) -> bool:
    """Whether reading this head is a large part of a forward pass."""
    return weight_VD.numel() >= LARGE_HEAD_WEIGHTS


def quantized_head(weight_VD: Tensor, bias_V: Tensor | None = None, *, tied: bool) -> nn.Module:
    """In four bits with its greatest logits exact, if it is large and the embedding keeps its weights anyway; else in eight bits."""
    return Shortlist(weight_VD) if tied and bias_V is None and is_large_head(weight_VD) else Int8Linear(weight_VD, bias_V)
