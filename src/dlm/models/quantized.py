"""Eight-bit weights for the CPU: a scale for each output, and inputs rounded row by row, so that products are sums of integers.

An integer sum is exact in any order, so a row's result does not depend on how many rows a call has. Inputs are rounded as in
LLM.int8 (Dettmers et al. 2208.07339), without its outliers.
Shapes: I and O features in and out, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 127  # of either sign


def rounded(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (N, I) and the scale (N, 1) of each row, in x's dtype: x is about their product."""
    scale_N1 = torch.linalg.vector_norm(x_NI, torch.inf, -1, True).div_(LEVELS).clamp_(min=1e-12)
    return (x_NI / scale_N1).round_().to(torch.int8), scale_N1


class Int8Linear(nn.Module):
    """y = W x + b with W as int8 (O, I) and a scale for each output. Only for inference, and only on a CPU."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        weight_OI, scale_O1 = rounded(weight_OI.detach().float())
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("weight", weight_OI, persistent=False)
        self.register_buffer("scale", scale_O1.squeeze(1), persistent=False)
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().float(), persistent=False)

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        x_NI, scale_N1 = rounded(x.flatten(0, -2).float())
        y_NO = (torch._int_mm(x_NI, self.weight.t()) * scale_N1).mul_(self.scale)
        y_NO = y_NO if self.bias is None else y_NO.add_(self.bias)
        return y_NO.to(x.dtype).view(*x.shape[:-1], -1)
