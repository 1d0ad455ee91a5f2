"""KL divergence of the predictions at masks from their teachers' over a large vocabulary, without a tensor of all logits.

Shapes: M masks, N teachers, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_MASKS = 48  # at once: their logits over 50,000 tokens take 9 MiB; with 2, 3 or 4 masks a teacher, no teacher is cut in two


def divergence(
    hidden_MD: Tensor, teacher_ND: Tensor, of_M: Tensor, weight_VD: Tensor, *, measure: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(nats_M, accept_M, agree_M): KL(p || q), sum_v min(p, q), and whether the likeliest tokens are the same.

    of_M: the teacher of each mask, in order, so that neighbours may share one. weight_VD: of the output layer; a frozen one is multiplied
    in chunks. measure: False leaves out the last two, which are then None.
    """
    if not weight_VD.requires_grad:
        found: tuple[Tensor, Tensor | None, Tensor | None]
        found = Divergence.apply(hidden_MD, teacher_ND, of_M, weight_VD, measure)  # type: ignore[no-untyped-call]
        return found
    logq_MV = F.linear(hidden_MD, weight_VD).float().log_softmax(-1)
    logp_MV = F.linear(teacher_ND, weight_VD).detach().float().log_softmax(-1)[of_M]
    nats_M = F.kl_div(logq_MV, logp_MV, reduction="none", log_target=True).sum(-1)
    if not measure:
        return nats_M, None, None
    return nats_M, torch.minimum(logp_MV, logq_MV.detach()).exp().sum(-1), logp_MV.argmax(-1) == logq_MV.argmax(-1)


class Divergence(torch.autograd.Function):
    """The forward pass computes the gradient with respect to the hidden states, (q - p) W for each mask, and keeps it instead of logits.

    Within a chunk, p is (N, 1, V) beside q (N, P, V) where every teacher has P masks there, else it is copied for each mask.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, teacher_ND: Tensor, of_M: Tensor, weight_VD: Tensor, measure: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        nats, accept, agree, slope = [], [], [], []
        for first in range(0, len(of_M), CHUNK_MASKS):
            own_M, h_MD = of_M[first : first + CHUNK_MASKS], hidden_MD[first : first + CHUNK_MASKS]
            n_N, count_N = torch.unique_consecutive(own_M, return_counts=True)
            logp_NV = (teacher_ND[n_N] @ weight_VD.T).float().log_softmax(-1)
            if bool((count_N != count_N[0]).any()):
                logp_NV = logp_NV.repeat_interleave(count_N, 0)
            p_NV = logp_NV.exp()
            logq_NPV = torch.unflatten((h_MD @ weight_VD.T).float().log_softmax(-1), 0, (len(p_NV), -1))
            negative_N1 = torch.linalg.vecdot(p_NV, logp_NV)[:, None]
            nats.append((negative_N1 - (logq_NPV @ p_NV[..., None]).squeeze(-1)).flatten())
            if measure:
                agree.append((logq_NPV.argmax(-1) == logp_NV.argmax(-1)[:, None]).flatten())
            q_NPV = logq_NPV.exp_()
            if measure:
                accept.append(torch.minimum(p_NV[:, None], q_NPV).sum(-1).flatten())
            if ctx.needs_input_grad[0]:
                slope.append(q_NPV.sub_(p_NV[:, None]).flatten(0, 1).to(weight_VD.dtype) @ weight_VD)
        ctx.save_for_backward(torch.cat(slope) if slope else hidden_MD.new_zeros(0))
        if not measure:
            return torch.cat(nats), None, None
        found = torch.cat(nats), torch.cat(accept), torch.cat(agree)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope_MD,) = ctx.saved_tensors
        return grads[0][:, None].to(slope_MD.dtype) * slope_MD, None, None, None, None
