"""Introspective-consistency training (I-DLM, arXiv 2604.11035): masks learn to say what the clean text would.

A row goes through a causal network twice in one call, [masks | text], with shared positions. The masks stand in blocks of stride - 1
and read the text before their block; hidden state s predicts token s + 1 in both halves, so the clean row s is the teacher of mask s.
The mask in slot j of its block has not seen j + 1 tokens that its teacher has.
Shapes: B rows, T positions, M masks that are scored, S = stride - 1 slots, V vocabulary without the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSSES = ("kl", "ce")


@dataclass(frozen=True)
class Consistency:
    """What one call gives. accepted_S / count_S is the chance that a draft of that slot is accepted; None where it was not asked for."""

    nats_B: Tensor  # of each row, a mean over its masks
    count_S: Tensor
    accepted_S: Tensor | None


def slots(free_BT: Tensor, stride: int, phase_B: Tensor) -> Tensor:
    """int64 (B, T): how many masks stand before this one in its block; -1 where there is no mask.

    Blocks of stride - 1 positions, the first cut by the row's phase; a block that begins with given tokens has fewer masks.
    """
    start_BT = torch.arange(free_BT.shape[1], device=free_BT.device) + phase_B[:, None]
    start_BT = (start_BT // (stride - 1) * (stride - 1) - phase_B[:, None]).clamp(min=0)  # where the block of a position begins
    before_BT = free_BT.long().cumsum(-1) - free_BT.long()
    return torch.where(free_BT, before_BT - before_BT.gather(1, start_BT), -1)


def consistency(
    network: nn.Module,
    x_BT: Tensor,
    free_BT: Tensor,
    phase_B: Tensor,
    *,
    stride: int,
    mask_id: int,
    how: str = "kl",
    clean: float | None = None,
    measure: bool = True,
) -> Consistency:
    """One call on text x, whose free tokens are masked; phase_B: 0 .. stride - 2, how far into a block each row begins.

    how: `kl`, KL(p || q) of the clean guess p and the mask's q, or `ce`, the mask's cross entropy of the text. A draft is accepted with
    chance sum_v min(p, q) = 1 - TV(p, q), and TV is at most sqrt(KL / 2) (Pinsker).
    clean: weight of the cross entropy of the clean half, 0 for the ratio of the two (I-DLM eq. 2), None for a frozen one, which has no
    gradient. measure: False spares the clean half's logits where `how` does not need them either.
    Position 0 is read, never masked. A last mask, whose token lies outside the row, is not scored. ValueError for an unknown `how`.
    """
    if how not in LOSSES:
        raise ValueError(f"unknown loss {how!r}; known: {', '.join(LOSSES)}")
    free_BT = free_BT & (torch.arange(x_BT.shape[1], device=x_BT.device) > 0)
    told_BT = F.pad(free_BT[:, 1:], (0, 1))  # positions whose next token is a free one
    scored_BT = free_BT & told_BT
    teaches = how == "kl" or measure
    clean_BT = told_BT if clean is not None else scored_BT & teaches
    z_BQ, at_BQ = torch.cat([x_BT.masked_fill(free_BT, mask_id), x_BT], 1), torch.cat([scored_BT, clean_BT], 1)
    logits_BQV = network(z_BQ, pattern="introspective", block_length=stride - 1, phase_B=phase_B, at_BQ=at_BQ)[..., :mask_id]
    noisy_BTV, clean_BTV = logits_BQV.chunk(2, 1)
    next_BT = x_BT.roll(-1, 1)

    logq_MV = noisy_BTV[scored_BT].float().log_softmax(-1)
    logp_MV = clean_BTV[scored_BT].detach().float().log_softmax(-1) if teaches else None
    if how == "kl":
        assert logp_MV is not None
        nats_M = F.kl_div(logq_MV, logp_MV, reduction="none", log_target=True).sum(-1)
    else:
        nats_M = F.nll_loss(logq_MV, next_BT[scored_BT], reduction="none")
    nats_B = _row_means(nats_M, scored_BT)
    if clean is not None:
        clean_B = _row_means(F.cross_entropy(clean_BTV[told_BT].float(), next_BT[told_BT], reduction="none"), told_BT)
        ratio = nats_B.detach().mean() / clean_B.detach().mean().clamp(min=1e-8) if clean == 0 else clean
        nats_B = nats_B + ratio * clean_B

    slot_M = slots(free_BT, stride, phase_B)[scored_BT]
    count_S = torch.bincount(slot_M, minlength=stride - 1)
    if not measure or logp_MV is None:
        return Consistency(nats_B, count_S, None)
    accept_M = torch.minimum(logp_MV, logq_MV.detach()).exp().sum(-1)
    return Consistency(nats_B, count_S, accept_M.new_zeros(stride - 1).index_add(0, slot_M, accept_M))


def _row_means(values_M: Tensor, at_BT: Tensor) -> Tensor:
    return torch.zeros_like(at_BT, dtype=values_M.dtype).masked_scatter(at_BT, values_M).sum(-1) / at_BT.sum(-1).clamp(min=1)


@torch.no_grad()
def acceptance(network: nn.Module, x_BT: Tensor, free_BT: Tensor, *, stride: int, mask_id: int, batch: int = 16) -> list[float]:
    """Mean chance that a draft of each slot is accepted, S numbers, on these rows; their phases go round."""
    accepted_S, count_S = torch.zeros(stride - 1, device=x_BT.device), torch.zeros(stride - 1, device=x_BT.device)
    phase_B = torch.arange(len(x_BT), device=x_BT.device) % (stride - 1)
    for rows in zip(*(torch.split(part, batch) for part in (x_BT, free_BT, phase_B)), strict=True):
        found = consistency(network, *rows, stride=stride, mask_id=mask_id)
        assert found.accepted_S is not None
        accepted_S, count_S = accepted_S + found.accepted_S, count_S + found.count_S
    return [float(a) for a in accepted_S / count_S.clamp(min=1)]


def tokens_per_forward(accept_S: Sequence[float], *, restart: bool = True) -> float:
    """Tokens that a call commits where slot j is accepted with chance accept_S[j], each for itself.

    A call that verifies S drafts commits 1 + a1 + a1 a2 + ... tokens. restart: unless all are accepted, a call follows that commits one
    and drafts again; with equal chances a and stride N it is then (2 + a + ... + a^(N - 2)) / (2 - a^(N - 1)) (I-DLM).
    """
    reach, tokens = 1.0, 1.0
    for chance in accept_S:
        reach *= chance
        tokens += reach
    return (tokens + 1 - reach) / (2 - reach) if restart else tokens
