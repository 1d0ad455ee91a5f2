"""Introspective-consistency training (I-DLM, arXiv 2604.11035): the predictions at masks learn those at the clean text.

A row is read as text and as masks, at shared positions. The masks stand in blocks of stride - 1 and attend to the text before their
block; hidden state s predicts token s + 1 in both, so the clean position s is the teacher of mask s. The mask in slot j of its block does
not attend to j + 1 tokens to which its teacher does. Beside a frozen base the text takes one forward pass without gradients, and masks
cut into blocks at several places attend to its keys and values; else one forward pass reads [masks | text].
Shapes: B rows, P phases of each, T positions, Q masks of a row, N teachers, M masks that are scored, S = stride - 1 slots, D width,
V vocabulary without the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.adapters.chain import Chain
from dlm.adapters.divergence import divergence
from dlm.adapters.lora import adapter_of
from dlm.models.cache import TextCache
from dlm.models.transformer import Transformer

LOSSES = ("kl", "ce")


@dataclass(frozen=True)
class Consistency:
    """Loss and acceptance of one batch. accepted_S / count_S is the chance that a draft token of that slot is accepted, agreed_S / count_S
    the share of equal likeliest tokens, which is acceptance at temperature 0; None where they were not asked for."""

    nats_B: Tensor  # of each row, a mean over its masks
    count_S: Tensor
    accepted_S: Tensor | None
    agreed_S: Tensor | None


def slots(free_BT: Tensor, stride: int, phase_B: Tensor) -> Tensor:
    """int64 (B, T): the number of masks before this one in its block; -1 where there is no mask.

    Blocks of stride - 1 positions, the first cut by the row's phase; a block that begins with given tokens has fewer masks.
    """
    start_BT = torch.arange(free_BT.shape[1], device=free_BT.device) + phase_B[:, None]
    start_BT = (start_BT // (stride - 1) * (stride - 1) - phase_B[:, None]).clamp(min=0)  # where the block of a position begins
    before_BT = free_BT.long().cumsum(-1) - free_BT.long()
    return torch.where(free_BT, before_BT - before_BT.gather(1, start_BT), -1)


def consistency(
    network: Transformer,
    x_BT: Tensor,
    free_BT: Tensor,
    phase_BP: Tensor,
    *,
    stride: int,
    mask_id: int,
    how: str = "kl",
    clean: float | None = None,
    measure: bool = True,
) -> Consistency:
    """Text x, whose free tokens are masked; phase_BP: 0 .. stride - 2, how far into a block each row begins, once or several times.

    how: `kl`, KL(p || q) from the clean prediction p to the mask's q, or `ce`, the mask's cross entropy of the text. A draft token is
    accepted with chance sum_v min(p, q) = 1 - TV(p, q), and TV is at most sqrt(KL / 2) (Pinsker).
    clean: weight of the cross entropy on the clean half, 0 for the ratio of the two (I-DLM eq. 2), None for a frozen base, which has no
    gradient. measure: False leaves out the acceptance.
    Position 0 is never masked. A last mask, whose token lies outside the row, has no loss. ValueError for an unknown `how`.
    """
    if how not in LOSSES:
        raise ValueError(f"unknown loss {how!r}; known: {', '.join(LOSSES)}")
    free_BT = free_BT & (torch.arange(x_BT.shape[1], device=x_BT.device) > 0)
    told_BT = F.pad(free_BT[:, 1:], (0, 1))  # positions whose next token is a free one
    read = _beside if clean is None else _together
    hidden_BTPD, clean_BTD = read(network, x_BT, free_BT, phase_BP, stride, mask_id)
    scored_BT = free_BT & told_BT
    phases, rows_N = phase_BP.shape[1], scored_BT.nonzero()[:, 0]
    hidden_MD, row_M = hidden_BTPD[scored_BT].flatten(0, 1), rows_N.repeat_interleave(phases)
    slot_BPT = torch.stack([slots(free_BT, stride, phase_B) for phase_B in phase_BP.T], 1)
    slot_M = slot_BPT.transpose(1, 2)[scored_BT].flatten()
    of_M = torch.arange(len(rows_N), device=x_BT.device).repeat_interleave(phases)
    adapter = adapter_of(network)
    if adapter is not None and adapter.chain is not None:
        place_M = scored_BT.flatten().nonzero().squeeze(-1)[of_M]
        hidden_MD = _chained(network, adapter.chain, hidden_MD, x_BT.flatten(), place_M, slot_M, stride - 1)
    next_BT, weight_VD = x_BT.roll(-1, 1), network.head.weight[:mask_id]
    accept_M = agree_M = None
    if how == "kl" or measure:
        with torch.set_grad_enabled(torch.is_grad_enabled() and how == "kl"):
            nats_M, accept_M, agree_M = divergence(hidden_MD, clean_BTD[scored_BT].detach(), of_M, weight_VD, measure=measure)
    if how == "ce":
        nats_M = F.cross_entropy(F.linear(hidden_MD, weight_VD).float(), next_BT[scored_BT][of_M], reduction="none")
    nats_B = _row_means(nats_M, row_M, len(x_BT))
    if clean is not None:
        clean_N = F.cross_entropy(F.linear(clean_BTD[told_BT], weight_VD).float(), next_BT[told_BT], reduction="none")
        clean_B = _row_means(clean_N, told_BT.nonzero()[:, 0], len(x_BT))
        ratio = nats_B.detach().mean() / clean_B.detach().mean().clamp(min=1e-8) if clean == 0 else clean
        nats_B = nats_B + ratio * clean_B

    sums_S = (sums(value_M, slot_M, stride - 1) if measure and value_M is not None else None for value_M in (accept_M, agree_M))
    return Consistency(nats_B, torch.bincount(slot_M, minlength=stride - 1), *sums_S)


def sums(value_M: Tensor, index_M: Tensor, count: int) -> Tensor:
    """float32 (count,): the values of each index."""
    return torch.zeros(count, device=value_M.device).index_add(0, index_M, value_M.float())


def _row_means(value_M: Tensor, row_M: Tensor, rows: int) -> Tensor:
    return sums(value_M, row_M, rows) / torch.bincount(row_M, minlength=rows).clamp(min=1)


def _chained(network: Transformer, chain: Chain, hidden_MD: Tensor, x_N: Tensor, place_M: Tensor, slot_M: Tensor, count: int) -> Tensor:
    """Hidden states of masks in `count` slots at these places of text x, after the network's chain has read the tokens before each."""
    for slot in range(count):
        at_N = (slot_M == slot).nonzero().squeeze(-1)
        before_NS = x_N[place_M[at_N, None] + torch.arange(-slot, 1, device=x_N.device)]
        chained_ND = chain(slot, hidden_MD[at_N], F.embedding(before_NS, network.embed.weight))
        hidden_MD = hidden_MD.index_copy(0, at_N, chained_ND)
    return hidden_MD


def _beside(network: Transformer, x_BT: Tensor, free_BT: Tensor, phase_BP: Tensor, stride: int, mask_id: int) -> tuple[Tensor, Tensor]:
    """Hidden states of masks (B, T, P, D), of every phase, and of the text (B, T, D): one forward pass of the text, without gradients.

    A second pass reads the masks of a row in every phase beside the text; given tokens are left out, for theirs are those of the text.
    """
    (rows, length), phases = x_BT.shape, phase_BP.shape[1]
    cache = TextCache()
    with torch.no_grad():
        clean_BTD = network(x_BT, cache=cache, logits=False)
    # places of the masks; where a row has fewer, of other tokens, to which nothing attends
    place_BQ = (~free_BT).int().argsort(dim=-1, stable=True)[:, : max(1, int(free_BT.sum(-1).max()))]
    real_BQ, place_BQ = free_BT.gather(1, place_BQ), place_BQ.clamp(min=1)
    place_CQ, real_CQ, free_CT = (part.repeat_interleave(phases, 0) for part in (place_BQ, real_BQ, free_BT))
    block_CQ = (place_CQ + phase_BP.flatten()[:, None]) // (stride - 1)
    column_T = torch.arange(length, device=x_BT.device)
    block_CT = (column_T + phase_BP.flatten()[:, None]) // (stride - 1)
    text_CQT = (block_CT[:, None] < block_CQ[..., None]) | (column_T < place_CQ[..., None]) & ~free_CT[:, None]
    own_CQQ = (place_CQ[:, None] <= place_CQ[..., None]) & (block_CQ[:, None] == block_CQ[..., None]) & real_CQ[:, None]
    own_CQQ = own_CQQ | torch.eye(own_CQQ.shape[1], dtype=torch.bool, device=x_BT.device)
    z_CQ = torch.full_like(place_CQ, mask_id)
    hidden_CQD = network(z_CQ, pos_BQ=place_CQ, own_BQQ=torch.cat([text_CQT, own_CQQ], 2), cache=cache, logits=False)
    hidden_BQPD = hidden_CQD.unflatten(0, (rows, phases)).transpose(1, 2)
    hidden_BTPD = hidden_BQPD.new_zeros(rows, length, *hidden_BQPD.shape[2:])
    index = (torch.arange(rows, device=x_BT.device)[:, None].expand_as(place_BQ)[real_BQ], place_BQ[real_BQ])
    return hidden_BTPD.index_put(index, hidden_BQPD[real_BQ]), clean_BTD


def _together(network: Transformer, x_BT: Tensor, free_BT: Tensor, phase_BP: Tensor, stride: int, mask_id: int) -> tuple[Tensor, Tensor]:
    """As `_beside`, in one forward pass on [masks | text], in which both have gradients; the text in that of the first phase."""
    phases = phase_BP.shape[1]
    z_BQ = torch.cat([x_BT.masked_fill(free_BT, mask_id), x_BT], 1).repeat_interleave(phases, 0)
    hidden_CQD = network(z_BQ, pattern="introspective", block_length=stride - 1, phase_B=phase_BP.flatten(), logits=False)
    masks_CTD, text_CTD = hidden_CQD.chunk(2, 1)
    return masks_CTD.unflatten(0, (-1, phases)).transpose(1, 2), text_CTD[::phases]


@dataclass(frozen=True)
class Acceptance:
    """Of each slot, on held-out rows: the mean chance that a draft token is accepted at temperature 1, and at temperature 0."""

    sampled: list[float]
    greedy: list[float]


@torch.no_grad()
def acceptance(network: Transformer, x_BT: Tensor, free_BT: Tensor, *, stride: int, mask_id: int, batch: int = 16) -> Acceptance:
    """On these rows, whose phases take turns."""
    phase_BP = torch.arange(len(x_BT), device=x_BT.device)[:, None] % (stride - 1)
    parts = zip(*(torch.split(part, batch) for part in (x_BT, free_BT, phase_BP)), strict=True)
    return mean_acceptance([consistency(network, *rows, stride=stride, mask_id=mask_id) for rows in parts])


def mean_acceptance(found: Sequence[Consistency]) -> Acceptance:
    """Of several batches."""
    count_S = torch.stack([one.count_S for one in found]).sum(0).clamp(min=1)
    kept_2S = torch.stack([torch.stack([cast(Tensor, part) for part in (one.accepted_S, one.agreed_S)]) for one in found]).sum(0)
    return Acceptance(*(kept_2S / count_S).tolist())
