"""RMSNorm, rotary positions, short convolution and squared ReLU in few operations, their gradients written out, for a CPU.

torch composes them of many elementwise operations, each of which reads and writes all of its input, forward and back. Here they take half
the passes over memory. Other devices and torch.compile fuse such operations by themselves.
Norms and rotations of bfloat16 compute in float32 and round once, at the end.
Shapes: B batch, Q positions, H heads, K head dim, J taps, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def pay(x: Tensor) -> bool:
    """Whether x is worked on where these functions take less time: on a CPU, eagerly."""
    return x.dtype != torch.float16 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension."""
    if not torch.is_grad_enabled():
        return _normed(_wide(x), eps)[0].mul_(weight_D).to(x.dtype)
    y: Tensor = _Norm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
    return y


def turned(x_BQHK: Tensor, weight_K: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads after RMSNorm by this weight, if there is one, and rotation; cos and sin (B or 1, Q, 1, K), the same in either half of K.

    Without gradients the weight may also be (H, K), each head's own.
    """
    if not torch.is_grad_enabled():
        wide_BQHK = _wide(x_BQHK)
        turned_BQHK = _rotated(wide_BQHK if weight_K is None else _normed(wide_BQHK, eps)[0].mul_(weight_K), cos, _signed(sin))
        return turned_BQHK.to(x_BQHK.dtype)
    y_BQHK: Tensor = _Turned.apply(x_BQHK, weight_K, eps, cos, sin)  # type: ignore[no-untyped-call]
    return y_BQHK


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, in the place of x where no gradient is recorded."""
    if not torch.is_grad_enabled():
        return x.relu_().square_()
    y: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    return y


def convolved(x_BQD: Tensor, weight_JD: Tensor, steps: range) -> Tensor:
    """x + sum over taps of weight * the neighbour so many steps on, which is 0 past either end."""
    if not torch.is_grad_enabled():
        return _sum_of_taps(x_BQD, weight_JD, steps)
    y_BQD: Tensor = _Convolved.apply(x_BQD, weight_JD, steps)  # type: ignore[no-untyped-call]
    return y_BQD


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x divided by its root mean square over the last dimension, and one over that (..., 1)."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def _norm_back(g: Tensor, normed: Tensor, inverse: Tensor, weight: Tensor, *, owned: bool) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight of an RMSNorm. owned: g may be written over."""
    size = normed.shape[-1]
    product_ND = (g * normed).reshape(-1, size)
    mean = torch.mv(product_ND, weight).div_(-size).view(inverse.shape)
    g = g.mul_(weight) if owned else g * weight
    return g.addcmul_(normed, mean).mul_(inverse), product_ND.sum(0)


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _normed(_wide(x), eps)
        ctx.save_for_backward(normed, inverse, weight)
        ctx.dtype = x.dtype
        return (normed * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        normed, inverse, weight = ctx.saved_tensors
        back, of_weight = _norm_back(_wide(g), normed, inverse, _wide(weight), owned=False)
        return back.to(ctx.dtype), of_weight.to(weight.dtype), None


def _signed(sin: Tensor) -> Tensor:
    """Of the half of K that each half is turned into."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def _rotated(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), signed_sin)


class _Turned(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.dtype, signed_sin = x.dtype, _signed(sin)
        if weight is None:
            ctx.save_for_backward(cos, signed_sin)
            return _rotated(_wide(x), cos, signed_sin).to(x.dtype)
        normed, inverse = _normed(_wide(x), eps)
        ctx.save_for_backward(cos, signed_sin, normed, inverse, weight)
        return _rotated(normed * weight, cos, signed_sin).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        cos, signed_sin, *norm = ctx.saved_tensors
        back = _rotated(_wide(g.contiguous()), cos, -signed_sin)  # the transposed rotation
        if not norm:
            return back.to(ctx.dtype), None, None, None, None
        normed, inverse, weight = norm
        back, of_weight = _norm_back(back, normed, inverse, _wide(weight), owned=True)
        return back.to(ctx.dtype), of_weight.to(weight.dtype), None, None, None


class _SquaredReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = F.relu(x)
        ctx.save_for_backward(kept)
        return kept * kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        back: Tensor = (g * kept).mul_(2)
        return back


def _overlap(length: int, step: int) -> tuple[slice, slice]:
    """The positions that have a neighbour so many steps on, and these neighbours."""
    first, last = max(0, -step), max(max(0, -step), length - max(0, step))
    return slice(first, last), slice(first + step, last + step)


def _sum_of_taps(x: Tensor, weight: Tensor, steps: range) -> Tensor:
    y = x.clone()
    for step, weight_D in zip(steps, weight, strict=True):
        here, there = _overlap(x.shape[1], step)
        y[:, here].addcmul_(x[:, there], weight_D)
    return y


class _Convolved(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, steps: range) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.steps = steps
        return _sum_of_taps(x, weight, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        back, of_weight = g.clone(), torch.empty_like(weight)
        for tap, step in enumerate(ctx.steps):
            here, there = _overlap(x.shape[1], step)
            back[:, there].addcmul_(g[:, here], weight[tap])
            torch.sum(g[:, here] * x[:, there], (0, 1), out=of_weight[tap])
        return back, of_weight, None
