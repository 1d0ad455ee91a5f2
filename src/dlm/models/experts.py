"""A mixture of experts in place of a block's MLP: a router sends each token to a few of many small MLPs.

LLaDA-MoE and LLaDA2 differ in how the router scores, chooses and weights; `ExpertsConfig` says which.
Shapes: N tokens, D width, E experts, S experts of a token, G groups of experts, M tokens of one expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.models.block import MLP, Block, MaskTokens
from dlm.models.config import ExpertsConfig, TransformerConfig

GROUP_BEST = 2  # experts of a group whose scores count for it (DeepSeek-V3, 2412.19437)


class Router(nn.Linear):
    """Which experts a token goes to, and how much each counts. In float32 whatever the network's type: a near-tie decides much."""

    def __init__(self, width: int, experts: ExpertsConfig) -> None:
        super().__init__(width, experts.count, bias=False)
        self.experts = experts
        self.register_buffer("correction", torch.zeros(experts.count) if experts.correction else None)

    correction: Tensor | None

    def choose(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, float32, and numbers of the experts of every token, both (N, S)."""
        e = self.experts
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        score_NE = logits_NE.sigmoid() if e.score == "sigmoid" else logits_NE.softmax(-1)
        rank_NE = score_NE if self.correction is None else score_NE + self.correction  # balances the choice, not the weights
        if e.groups > 1:
            rank_NE = self._within_groups(rank_NE)
        chosen_NS = rank_NE.topk(e.per_token, -1).indices
        weight_NS = score_NE.gather(-1, chosen_NS)
        if e.normalised and e.per_token > 1:
            weight_NS = weight_NS / weight_NS.sum(-1, keepdim=True)
        return weight_NS * e.scaling, chosen_NS

    def _within_groups(self, rank_NE: Tensor) -> Tensor:
        """The ranks, -inf outside of each token's best groups."""
        rank_NGE = torch.unflatten(rank_NE, 1, (self.experts.groups, -1))
        group_NG = rank_NGE.topk(min(GROUP_BEST, rank_NGE.shape[-1]), -1).values.sum(-1)
        best_NG = torch.zeros_like(group_NG, dtype=torch.bool).scatter_(1, group_NG.topk(self.experts.groups_per_token, -1).indices, True)
        return rank_NGE.masked_fill(~best_NG[..., None], -torch.inf).flatten(1)


class Experts(nn.Module):
    """sum over a token's experts of weight * expert(x), plus the MLP that all tokens share, if there is one."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        e = config.experts
        assert e is not None
        one = config.with_(mlp_width=e.width)
        self.router = Router(config.width, e)
        self.experts = nn.ModuleList(MLP(one) for _ in range(e.count))
        self.shared = MLP(config.with_(mlp_width=e.shared_width)) if e.shared_width else None

    def forward(self, x: Tensor, mask_tokens: MaskTokens | None = None) -> Tensor:
        """x (..., D). Every expert reads its tokens together; those that no token chose are not run."""
        x_ND = x.flatten(0, -2)
        weight_NS, chosen_NS = self.router.choose(x_ND)
        order_K = chosen_NS.flatten().argsort(stable=True)
        counts = chosen_NS.flatten().bincount(minlength=len(self.experts)).tolist()
        y_ND = x_ND.new_zeros(x_ND.shape, dtype=torch.float32)
        for expert, at_M in zip(self.experts, order_K.split(counts), strict=True):
            if len(at_M):
                token_M = at_M // chosen_NS.shape[1]
                y_ND.index_add_(0, token_M, expert(x_ND[token_M]).float() * weight_NS.flatten()[at_M, None])
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND).float()
        return y_ND.to(x.dtype).view_as(x)


def make_block(config: TransformerConfig, layer: int) -> Block:
    """A block with experts, or with an MLP in the first layers and in a network that has none."""
    block = Block(config, layer)
    if config.experts is not None and layer >= config.experts.first_layer:
        block.mlp = Experts(config)
    return block
