"""Semantic noise: first towards a similar token, then towards anything.

A token drifts inside its cluster of similar tokens on one clock, and to the prior on a second, slower one at first.
"Uniform within a cluster" and "uniform over all" are projections that commute, so marginals and moves have closed forms
(a nearest-neighbour kernel, as in D3PM, has none). Cf. HDLM (arXiv 2510.08632). Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.noise.replacement import Kernel, ReplacementNoise


@dataclass(frozen=True)
class SemanticNoise(ReplacementNoise):
    """q_t = a1 a2 I + a2 (1 - a1) K_cluster + (1 - a2) K_prior with a1 = alpha_t and a2 = 1 - (1 - alpha_t)^lead.

    clusters: one number for every token of the vocabulary, the mask apart from all. lead: how far the drift inside clusters is
    ahead; 1 is not at all. prior: uniform | mask.
    """

    lead: float = 2.0
    to: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.lead < float("inf"):
            raise ValueError(f"the lead of the clusters must be at least 1, got {self.lead}")
        if self.to not in ("uniform", "mask"):
            raise ValueError(f"unknown prior {self.to!r}; known: uniform, mask")
        if len(self.clusters) != self.vocab_size:
            raise ValueError(f"{len(self.clusters)} tokens have a cluster, the vocabulary has {self.vocab_size} with the mask")
        if sorted(set(self.clusters)) != list(range(max(self.clusters) + 1)):
            raise ValueError("clusters are to be numbered 0, 1, 2 ... without a gap")
        if self.clusters.count(self.clusters[self.mask_id]) > 1:
            raise ValueError("the mask shares a cluster with tokens of the text")

    def _prior_to(self, far_B: Tensor) -> Tensor:
        return self._on(far_B, "_data_V" if self.to == "uniform" else "_mask_V")

    def _clocks(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        near_B = self.schedule.alpha(t_B)
        return near_B, 1 - (1 - near_B) ** self.lead

    def _kernel(self, near_B: Tensor, far_B: Tensor) -> Kernel:
        return Kernel(near_B * far_B, (1 - near_B) * far_B, (1 - far_B)[:, None] * self._prior_to(far_B))

    def kernel(self, t_B: Tensor) -> Kernel:
        return self._kernel(*self._clocks(t_B))

    def between(self, s_B: Tensor, t_B: Tensor) -> Kernel:
        (near_s, far_s), (near_t, far_t) = self._clocks(s_B), self._clocks(t_B)
        return self._kernel(near_t / near_s, far_t / far_s)

    def rate(self, t_B: Tensor) -> Kernel:
        (near_B, far_B), dnear_B = self._clocks(t_B), self.schedule.dalpha(t_B)
        dfar_B = self.lead * (1 - near_B) ** (self.lead - 1) * dnear_B
        return Kernel(torch.zeros_like(near_B), -dnear_B / near_B, (-dfar_B / far_B)[:, None] * self._prior_to(far_B))
