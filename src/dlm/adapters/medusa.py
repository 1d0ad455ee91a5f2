"""Medusa-1 heads (Cai et al. 2401.10774): they draft further tokens from the last hidden state of a frozen base, whose output layer they
share. Head k = 1, 2 ... predicts the token k places after the one that the base itself predicts there.

Shapes: B rows, T positions, N scored positions, K heads, M = N K predictions, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.adapters import files
from dlm.adapters.divergence import divergence
from dlm.adapters.lora import fingerprint
from dlm.adapters.objective import Acceptance, Consistency, mean_acceptance, sums
from dlm.errors import InputError
from dlm.models.transformer import Transformer

MAX_HEADS = 64  # each is a matrix, and drafts one token further than the one before
WEIGHTS, CONFIG = "heads.safetensors", "heads.json"


@dataclass(frozen=True)
class HeadsConfig:
    """heads.json."""

    count: int = 3
    base: str = ""
    fingerprint: str = ""
    made: dict[str, Any] = field(default_factory=dict)  # how: settings and figures of their training

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_HEADS:
            raise InputError(f"heads count from 1 to {MAX_HEADS}, got {self.count}")


class Heads(nn.Module):
    """h + silu(W h + b) for each head, W and b zero at first: each then predicts as the base does. float32, beside a base of any dtype."""

    def __init__(self, network: Transformer, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        width = network.config.width
        self.weight = nn.Parameter(torch.zeros(config.count, width, width, device=network.device))
        self.bias = nn.Parameter(torch.zeros(config.count, width, device=network.device))
        self._base = [network]  # in a list: no part of this module

    def states(self, hidden_ND: Tensor, count: int | None = None) -> Tensor:
        """(N, K, D): the input of the output layer for each head, by default for all."""
        inner_NKD = torch.einsum("nd,kod->nko", hidden_ND.float(), self.weight[:count]) + self.bias[:count]
        return (hidden_ND[:, None].float() + F.silu(inner_NKD)).to(hidden_ND.dtype)

    def forward(self, hidden_BD: Tensor, count: int) -> Tensor:
        """Logits (B, K, V) of the first `count` heads."""
        return self._base[0].read_out(self.states(hidden_BD, count), draft=True)


def foresight(
    network: Transformer, heads: Heads, x_BT: Tensor, free_BT: Tensor, *, mask_id: int, how: str = "kl", measure: bool = True
) -> Consistency:
    """The heads at every position of text x whose next tokens are free, against the base's own predictions where it has read them.

    how: `kl` or `ce`, measure: as of `objective.consistency`; slot k - 1 is head k.
    """
    free_BT = free_BT & (torch.arange(x_BT.shape[1], device=x_BT.device) > 0)
    with torch.no_grad():
        hidden_BTD = network(x_BT, logits=False)
    ahead = torch.arange(1, heads.config.count + 1, device=x_BT.device)
    column_T = torch.arange(x_BT.shape[1], device=x_BT.device)
    target_TK = column_T[:, None] + 1 + ahead  # the token that head k is about
    inside_TK = target_TK < x_BT.shape[1]
    told_BTK = F.pad(free_BT, (-1, 1))[..., None] & free_BT[:, target_TK.clamp(max=x_BT.shape[1] - 1)] & inside_TK
    row_M, place_M, slot_M = told_BTK.nonzero().unbind(-1)
    used_BT = told_BTK.any(-1)
    hidden_MD = heads.states(hidden_BTD[used_BT])[told_BTK[used_BT]]
    teacher_M = place_M + 1 + slot_M  # where the base predicts the same token
    order_M = (row_M * x_BT.shape[1] + teacher_M).argsort(stable=True)  # neighbours share a teacher
    row_M, slot_M, teacher_M, hidden_MD = row_M[order_M], slot_M[order_M], teacher_M[order_M], hidden_MD[order_M]
    flat_M, of_M = torch.unique_consecutive(row_M * x_BT.shape[1] + teacher_M, return_inverse=True)
    weight_VD = network.head.weight[:mask_id]
    accept_M = agree_M = None
    if how == "kl" or measure:
        with torch.set_grad_enabled(torch.is_grad_enabled() and how == "kl"):
            nats_M, accept_M, agree_M = divergence(hidden_MD, hidden_BTD.flatten(0, 1)[flat_M], of_M, weight_VD, measure=measure)
    if how == "ce":
        nats_M = F.cross_entropy(F.linear(hidden_MD, weight_VD).float(), x_BT[row_M, teacher_M + 1], reduction="none")
    nats_B = sums(nats_M, row_M, len(x_BT)) / torch.bincount(row_M, minlength=len(x_BT)).clamp(min=1)
    count = heads.config.count
    sums_S = (sums(value_M, slot_M, count) if value_M is not None else None for value_M in (accept_M, agree_M))
    return Consistency(nats_B, torch.bincount(slot_M, minlength=count), *sums_S)


@torch.no_grad()
def acceptance(network: Transformer, heads: Heads, x_BT: Tensor, free_BT: Tensor, *, mask_id: int, batch: int = 16) -> Acceptance:
    """Of each head, on these rows."""
    batches = zip(torch.split(x_BT, batch), torch.split(free_BT, batch), strict=True)
    return mean_acceptance([foresight(network, heads, x, free, mask_id=mask_id) for x, free in batches])


def save_heads(directory: str | Path, heads: Heads, config: HeadsConfig) -> None:
    """Write heads.safetensors (bfloat16), then heads.json, each whole or not at all."""
    weights, about = Path(directory) / WEIGHTS, Path(directory) / CONFIG
    files.save(weights, dict(heads.named_parameters()), about, config, dtype=torch.bfloat16)


def load_heads(path: str | Path, network: Transformer) -> Heads:
    """The heads of a directory, for the base that they were made for. InputError for another base, and for files missing or damaged."""
    weights, about = Path(path) / WEIGHTS, Path(path) / CONFIG
    if not about.is_file():
        raise InputError(f"no heads in {path}: it has no {CONFIG} (dlm convert --heads 3 writes one)")
    config = files.read_config(about, HeadsConfig, "heads")
    files.check_base(config, fingerprint(network), f"the heads in {path} were")
    heads = Heads(network, config)
    files.fill(dict(heads.named_parameters()), files.read_weights(weights), weights, about)
    return heads.requires_grad_(False)
