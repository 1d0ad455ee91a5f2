"""The forward pass of speculative decoding: [new text | draft tokens | groups of masks] against one KV cache.

Its output at the last token and at each draft token is the target's distribution of the next one, whatever stands after. Masks say what
follows a prefix of the draft tokens (I-DLM, arXiv 2604.11035, figure 2).
Shapes: B rows, K draft tokens, P = K + 1 places (the committed text, then after each draft token), W inputs before the masks, M masks of a
group, G groups, E = G M masks of all, Q = W + E inputs, V vocabulary, D width, X a vocabulary or width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.protocols import Denoiser
from dlm.sampling.autoregressive.committed_text import CommittedText
from dlm.sampling.autoregressive.draft_tokens import DraftTokens
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.protocols import Drafter, RowCache


def causal(length: int, device: torch.device) -> Tensor:
    """bool (Q, Q)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


@dataclass(frozen=True)
class Output:
    """logits_BPV: after every place; after_BG: the place of each group of masks; mask_BEX: their logits, or hidden states where the drafter
    reads those, and then state_BPD: of the places. positions: that were read."""

    logits_BPV: Tensor
    after_BG: Tensor
    mask_BEX: Tensor
    state_BPD: Tensor | None
    positions: int

    def masks_after(self, place_B: Tensor, masks: int) -> tuple[Tensor, Tensor]:
        """(the outputs of the group of masks at each row's place (B, M, X), whether there is one (B,))."""
        hit_BG = self.after_BG == place_B[:, None]
        if not hit_BG.shape[1]:
            return self.mask_BEX, hit_BG.any(-1)
        rows_B, masks_M = torch.arange(len(place_B), device=place_B.device), torch.arange(masks, device=place_B.device)
        return self.mask_BEX[rows_B[:, None], hit_BG.int().argmax(1, keepdim=True) * masks + masks_M], hit_BG.any(-1)


@dataclass(frozen=True)
class VerifyingPass:
    """One forward pass that verifies draft tokens.

    start: the token before a window, None for nothing. masks: of a group; live_B: rows that are asked for. new_B: inputs that a row knows
    and has not read; they and its draft tokens lie in front, so that the accepted ones are a prefix.
    """

    denoiser: Denoiser
    drafter: Drafter
    mask_id: int
    start: int | None
    masks: int

    def __call__(self, text: CommittedText, drafts: DraftTokens, tree: Tree, live_B: Tensor, new_B: Tensor, cache: RowCache) -> Output:
        tables, held_B, count_B = tree.tables(new_B.device), cache.length_B, drafts.count_B * live_B
        place_BW, index_BW = self._places(drafts, held_B, new_B, count_B)
        after_BG = self.drafter.groups(count_B)
        after_BE = after_BG.repeat_interleave(self.masks, 1)
        depth_E = torch.arange(self.masks, device=new_B.device).repeat(after_BG.shape[1])
        drafts_BW = F.pad(drafts.token_BK, (1, 0)).gather(1, place_BW)
        token_BW = torch.where(place_BW > 0, drafts_BW, text.inputs(index_BW, self.start))
        z_BQ = torch.cat([token_BW, torch.full_like(after_BE, self.mask_id)], 1)
        pos_BE = (held_B + new_B)[:, None] + tables.depth_P[after_BE] + depth_E
        pos_BQ = torch.cat([index_BW + tables.depth_P[place_BW], pos_BE], 1)
        reads_PP = F.pad(tables.reads_PK[: drafts.token_BK.shape[1] + 1, : drafts.token_BK.shape[1]], (1, 0), value=True)
        own_BQQ = self._attention(reads_PP, place_BW, new_B + count_B, after_BE, depth_E)
        first_B = (new_B - 1).clamp(min=0)  # logits from the last token on
        w_W, reads = torch.arange(place_BW.shape[1], device=new_B.device), self.drafter.reads_states
        at_BW = (w_W >= first_B[:, None]) & (w_W < (new_B + count_B)[:, None])
        at_BQ = torch.cat([at_BW, (live_B[:, None] & (not reads)).expand_as(after_BE)], 1)
        states: list[Tensor] = []
        more: dict[str, Any] = {"states": states} if reads else {}
        logits_BQV = self.denoiser(z_BQ, pos_BQ=pos_BQ, own_BQQ=own_BQQ, at_BQ=at_BQ, cache=cache, **more)
        at_BP = (first_B[:, None] + torch.arange(drafts.token_BK.shape[1] + 1, device=new_B.device)).clamp(max=z_BQ.shape[1] - 1)
        at = torch.arange(len(new_B), device=new_B.device)[:, None], at_BP
        mask_BEX = (states[0] if states else logits_BQV)[:, place_BW.shape[1] :]
        return Output(logits_BQV[at], after_BG, mask_BEX, states[0][at] if states else None, z_BQ.shape[1])

    @staticmethod
    def _places(drafts: DraftTokens, held_B: Tensor, new_B: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
        """Of inputs before the masks: place in the tree, 0 for text, and index in the window, of draft tokens that of the last one."""
        w_W = torch.arange(int((new_B + count_B).max()), device=new_B.device)
        place_BW = (w_W - new_B[:, None] + 1).clamp(0, drafts.token_BK.shape[1])
        return place_BW, (held_B[:, None] + torch.minimum(w_W, new_B[:, None] - 1)).clamp(min=0)

    def _attention(self, reads_PP: Tensor, place_BW: Tensor, last_B: Tensor, after_BE: Tensor, depth_E: Tensor) -> Tensor:
        """bool (B, Q, Q): text is causal, a draft token reads its path, and neither reads a mask; a mask reads the path to its place, and
        earlier masks of its group. reads_PP: a place, and those on the path to it.
        """
        (rows, width), device = place_BW.shape, place_BW.device
        rows_B1, w_W = torch.arange(rows, device=device)[:, None], torch.arange(width, device=device)
        reads_BPW = reads_PP[:, place_BW].transpose(0, 1) & (w_W < last_B[:, None])[:, None]
        reads_BWW = causal(width, device) & reads_BPW[rows_B1, place_BW] | torch.eye(width, dtype=torch.bool, device=device)
        group_E = torch.arange(len(depth_E), device=device) // max(1, self.masks)
        reads_EE = (group_E[:, None] == group_E) & (depth_E <= depth_E[:, None])
        masks_BEQ = torch.cat([reads_BPW[rows_B1, after_BE], reads_EE.expand(rows, -1, -1)], 2)
        return torch.cat([F.pad(reads_BWW, (0, len(depth_E))), masks_BEQ], 1)
