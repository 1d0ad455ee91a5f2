"""KL divergence of masks from their teachers over a large vocabulary, without a tensor of all logits.

Shapes: M masks, N teachers, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # masks at once: their logits over 50,000 words take 12 MiB


def divergence(hidden_MD: Tensor, teacher_ND: Tensor, of_M: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nats_M, accept_M, agree_M): KL(p || q), sum_v min(p, q), and whether the likeliest token is the same.

    of_M: the teacher of each mask, in order, so that neighbours may share one. weight_VD: of the head; a frozen one is read in pieces.
    """
    if not weight_VD.requires_grad:
        found: tuple[Tensor, Tensor, Tensor] = Divergence.apply(hidden_MD, teacher_ND, of_M, weight_VD)  # type: ignore[no-untyped-call]
        return found
    logq_MV = F.linear(hidden_MD, weight_VD).float().log_softmax(-1)
    logp_MV = F.linear(teacher_ND, weight_VD).detach().float().log_softmax(-1)[of_M]
    nats_M = F.kl_div(logq_MV, logp_MV, reduction="none", log_target=True).sum(-1)
    return nats_M, torch.minimum(logp_MV, logq_MV.detach()).exp().sum(-1), logp_MV.argmax(-1) == logq_MV.argmax(-1)


class Divergence(torch.autograd.Function):
    """The gradient with respect to the hidden states is made on the way, (q - p) W for each mask, and kept in place of logits."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, teacher_ND: Tensor, of_M: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nats, accept, agree, slope = [], [], [], []
        for first in range(0, len(of_M), CHUNK):
            own_M, h_MD = of_M[first : first + CHUNK], hidden_MD[first : first + CHUNK]
            n_N, of = torch.unique_consecutive(own_M, return_inverse=True)
            logp_NV = (teacher_ND[n_N] @ weight_VD.T).float().log_softmax(-1)
            p_NV = logp_NV.exp()
            negative_N = (p_NV * logp_NV).sum(-1)
            logq_MV = (h_MD @ weight_VD.T).float().log_softmax(-1)
            p_MV = p_NV[of]
            nats.append(negative_N[of] - torch.linalg.vecdot(p_MV, logq_MV))
            agree.append(logq_MV.argmax(-1) == logp_NV.argmax(-1)[of])
            q_MV = logq_MV.exp_()
            accept.append(torch.minimum(p_MV, q_MV).sum(-1))
            if ctx.needs_input_grad[0]:
                slope.append((q_MV - p_MV).to(weight_VD.dtype) @ weight_VD)
        ctx.save_for_backward(torch.cat(slope) if slope else hidden_MD.new_zeros(0))
        found = torch.cat(nats), torch.cat(accept), torch.cat(agree)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope_MD,) = ctx.saved_tensors
        return grads[0][:, None].to(slope_MD.dtype) * slope_MD, None, None, None
