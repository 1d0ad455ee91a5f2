"""Weights in eight or four bits for the CPU, by torch's own kernels; what they are multiplied with stays as it is, in bfloat16.

Eight bits: a scale for each output. Four: a scale and an offset for every `GROUP` weights of an output, as in GGUF's Q4_1, so that weights
which came in that form are met again, each one exactly but for the sixteen bits of its scale and offset.
Shapes: I and O features in and out, G groups, N rows.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.inference.packed import TwoLayouts
from dlm.models.block import in_pieces

GROUP = 32  # weights that share a scale: the least that the kernel knows
OUTPUTS = 16  # the kernels want a multiple of these, and of `GROUP` inputs


class RoundedLinear(TwoLayouts):
    """y = W x + b with W in a few bits. Only for inference, and only on a CPU. `rows`: of `in_pieces`.

    For more rows than a few W is read in bfloat16: from a second layout, or where memory is short written out each time.
    """

    few: ClassVar[int]  # where there is a second layout
    short: ClassVar[int]  # where there is none

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.rows = 0
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().float(), persistent=False)
        self.pads = -self.in_features % GROUP, -self.out_features % OUTPUTS
        weight_OI = weight_OI.detach().float()
        self.round(F.pad(weight_OI, (0, self.pads[0], 0, self.pads[1])) if any(self.pads) else weight_OI)

    bias: Tensor | None

    def round(self, weight_OI: Tensor) -> None:
        """Keep these weights in fewer bits."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(self._product, x, self.rows)

    def _product(self, x: Tensor) -> Tensor:
        x_NI = x.flatten(0, -2).bfloat16()
        if self.pads[0]:
            x_NI = F.pad(x_NI, (0, self.pads[0]))
        if len(x_NI) <= (self.few if self.packs else self.short):
            y_NO = self.read(x_NI)
        else:
            y_NO = self.second(x_NI, self.out_features + self.pads[1]) if self.packs else F.linear(x_NI, self.written_out())
        if self.pads[1]:
            y_NO = y_NO[:, : self.out_features]
        y_NO = y_NO.to(x.dtype) if self.bias is None else (y_NO + self.bias).to(x.dtype)
        return y_NO.view(*x.shape[:-1], self.out_features)

    def read(self, x_NI: Tensor) -> Tensor:
        """W x, bfloat16 (N, O)."""
        raise NotImplementedError

    def written_out(self) -> Tensor:
        """W in bfloat16."""
        raise NotImplementedError


class Int8Linear(RoundedLinear):
    few, short = 1, 16

    def round(self, weight_OI: Tensor) -> None:
        scale_O = (weight_OI.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
        self.register_buffer("scale", scale_O, persistent=False)
        self.register_buffer("weight", (weight_OI / scale_O.float()[:, None]).round().clamp(-127, 127).to(torch.int8), persistent=False)

    weight: Tensor
    scale: Tensor

    def read(self, x_NI: Tensor) -> Tensor:
        y_NO: Tensor = torch.ops.aten._weight_int8pack_mm(x_NI, self.weight, self.scale)
        return y_NO

    def written_out(self) -> Tensor:
        return self.weight.bfloat16() * self.scale[:, None]


class Int4Linear(RoundedLinear):
    few, short = 6, 64

    def round(self, weight_OI: Tensor) -> None:
        weight_OGI = torch.unflatten(weight_OI, 1, (-1, GROUP))
        low_OG1, high_OG1 = torch.aminmax(weight_OGI, dim=-1, keepdim=True)
        scale_OG1 = ((high_OG1 - low_OG1) / 15).clamp(min=1e-12)
        offset_OG1 = (low_OG1 + 8 * scale_OG1).bfloat16()  # what code 8 stands for
        scale_OG1 = scale_OG1.bfloat16()
        code_OGI = (weight_OGI - offset_OG1).div_(scale_OG1).round_().add_(8).clamp_(0, 15)
        code_OI = code_OGI.flatten(1).to(torch.uint8)
        # the kernel has a layout of its own, which only it can read
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code_OI.int(), 2)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale_GO2", torch.cat([scale_OG1, offset_OG1], -1).transpose(0, 1).contiguous(), persistent=False)
        self.register_buffer("codes", code_OI[:, ::2] | code_OI[:, 1::2] << 4, persistent=False)

    packed: Tensor
    scale_GO2: Tensor
    codes: Tensor

    def read(self, x_NI: Tensor) -> Tensor:
        y_NO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI, self.packed, GROUP, self.scale_GO2)
        return y_NO

    def written_out(self) -> Tensor:
        code_OI = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1)
        scale_OG1, offset_OG1 = self.scale_GO2.transpose(0, 1)[..., None].unbind(2)
        weight_OGI = torch.unflatten(code_OI.bfloat16() - 8, 1, (-1, GROUP)) * scale_OG1 + offset_OG1
        return weight_OGI.flatten(1)


class Shortlist(nn.Module):
    """y = W x with W in four bits, but for the greatest outputs of each row, which are computed anew with W as it is.

    For a large head: the likeliest tokens are exactly so likely, to one another, as they should be, and the others nearly.
    """

    def __init__(self, weight_OI: Tensor, best: int = 256) -> None:
        super().__init__()
        self.rows = 0  # of `in_pieces`
        self.coarse, self.best = Int4Linear(weight_OI), min(best, len(weight_OI))
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("weight", weight_OI.detach(), persistent=False)

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(self._product, x, self.rows)

    def _product(self, x: Tensor) -> Tensor:
        y: Tensor = self.coarse(x)
        best = y.topk(self.best, -1, sorted=False).indices
        return y.scatter_(-1, best, (F.embedding(best, self.weight) @ x[..., None]).squeeze(-1).to(y.dtype))


LINEAR = {8: Int8Linear, 4: Int4Linear}  # by bits
