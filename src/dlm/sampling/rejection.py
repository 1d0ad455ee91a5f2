"""Rejection sampling of draft tokens: drawn from q, verified against p, they are distributed as p.

Speculative sampling, Leviathan et al. 2211.17192 and Chen et al. 2302.01318.
Shapes: B rows, K draft tokens, P places of a verified token (K, or K + 1 with the one after the last draft token), V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.sampling.draw import categorical, pick


def verify(
    p_BPV: Tensor,
    q_BKV: Tensor,
    token_BK: Tensor,
    count_B: Tensor,
    test_BK: Tensor,
    again_BP: Tensor,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(how many draft tokens are accepted from the left, the token at the place after them), int64 (B,).

    Draft token x of a row's first count_B is accepted with min(1, p(x) / q(x)). The first rejected one is drawn anew from max(0, p - q);
    after a row whose draft tokens were all accepted, the next is drawn from p. A certain draft token has q(x) = 1.
    p, q: probabilities, float64. test_BK: uniforms that accept or reject; again_BP: those that draw, one for each place.
    tolerance: accept with min(1, (1 + tolerance) p / q) instead, which is not exact.
    """
    kept_BK = test_BK * pick(q_BKV, token_BK) < (1 + tolerance) * pick(p_BPV[:, : token_BK.shape[1]], token_BK)
    kept_BK = kept_BK & (torch.arange(token_BK.shape[1], device=token_BK.device) < count_B[:, None])
    accepted_B = kept_BK.int().cumprod(-1).sum(-1)
    rejects_B = accepted_B < count_B
    at = torch.arange(len(count_B), device=count_B.device), accepted_B.clamp(max=p_BPV.shape[1] - 1)
    p_BV, q_BV = p_BPV[at], F.pad(q_BKV, (0, 0, 0, p_BPV.shape[1] - q_BKV.shape[1]))[at] * rejects_B[:, None]
    rest_BV = (p_BV - q_BV).clamp(min=0)
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)  # p = q up to rounding
    return accepted_B, categorical(rest_BV.log()[:, None], again_BP[at][:, None]).squeeze(1)
