"""Drafters: where draft tokens come from. Masks in the same forward pass or in one of their own, heads, the text so far, a smaller or
quantized network.

Shapes: B rows, L columns of the canvas, K draft tokens, N paths of a tree, M masks of a group, G groups, Q inputs of a forward pass,
S places of a path, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.errors import InputError, in_range
from dlm.protocols import Denoiser
from dlm.sampling.autoregressive.committed_text import put, read_inputs
from dlm.sampling.autoregressive.draft_length import MAX_STRIDE, tokens_per_forward
from dlm.sampling.autoregressive.draft_tokens import DraftTokens
from dlm.sampling.autoregressive.network_call import causal
from dlm.sampling.autoregressive.protocols import DraftContext, RowCache

LAYOUTS = ("tree", "restart")
MAX_NGRAM = 64
"""Tokens that prompt lookup compares at most."""
MAX_LEAD_NATS = 100.0
MAX_MEASURED_POSITIONS = 1024
"""Of a forward pass that is timed to choose a layout."""


def no_groups(count_B: Tensor) -> Tensor:
    """For drafters that add nothing to the forward pass."""
    return count_B.new_zeros(len(count_B), 0)


@dataclass(frozen=True)
class MaskDrafter:
    """The network itself: masks in the forward pass that verifies the last draft (introspective strided decoding, I-DLM 2604.11035).

    A group of stride - 1 masks stands for the token after a prefix of the draft tokens, still unknown, and those after it; each reads the
    prefix and the masks before it in its group. `restart`, as published: one group, after all draft tokens, so that a rejection leaves no
    draft and the next pass drafts anew; 2N - 1 positions a pass. `tree`: a group after every prefix, so that there is always one; N^2.
    chain(slot, state_BD, before_BS): logits (B, V) of the masks of a slot once the tokens of the places up to theirs are drawn
    (`dlm.adapters.chain`). Without, each mask is drawn from as if the others were unknown. InputError for an unknown layout.
    """

    layout: str = "tree"
    chain: Callable[[int, Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InputError(f"unknown layout {self.layout!r}; known: {', '.join(LAYOUTS)}")

    @property
    def reads_states(self) -> bool:
        return self.chain is not None

    def groups(self, count_B: Tensor) -> Tensor:
        if self.layout == "restart":
            return count_B[:, None]
        return torch.arange(int(count_B.max()) + 1, device=count_B.device).expand(len(count_B), -1)

    def __call__(self, context: DraftContext) -> DraftTokens:
        text, last = context.text, context.last
        last_B1 = text.tokens_BL.gather(1, (text.known_B - 1).clamp(min=0)[:, None])

        def logits_of(slot: int, path_BNS: Tensor) -> Tensor:
            if self.chain is None:
                return last.mask_BMX[:, slot, None]
            (rows, paths), state_BD = path_BNS.shape[:2], last.mask_BMX[:, slot]
            before_BNS = torch.cat([last_B1[:, None].expand(-1, paths, -1), path_BNS], 2)
            logits_NV = self.chain(slot, state_BD.repeat_interleave(paths, 0), before_BNS.flatten(0, 1))
            return logits_NV.view(rows, paths, -1)

        return context.request.grow(logits_of, torch.where(last.masked_B, context.request.limit_B, 0))

    @classmethod
    def cheapest(cls, seconds: Callable[[Sequence[int]], Sequence[float]], stride: int, acceptance: float, **options: Any) -> MaskDrafter:
        """The layout with more tokens a second at this acceptance; `restart`, unmeasured, for strides whose tree is too large to pay.

        seconds: of forward passes of so many positions.
        """
        if stride**2 > MAX_MEASURED_POSITIONS:
            return cls("restart", **options)
        taken = dict(zip(LAYOUTS, seconds([stride**2, 2 * stride - 1]), strict=True))
        accept_S = [acceptance] * (stride - 1)
        return cls(max(LAYOUTS, key=lambda layout: tokens_per_forward(accept_S, restart=layout == "restart") / taken[layout]), **options)


@dataclass(frozen=True)
class PromptLookup:
    """The tokens that followed when the last ones stood in the text before, up to `ngram` of them, the latest place of the longest match.

    Saxena, prompt-lookup-decoding, 2023; `ngram` in vLLM. Where that place is so near that its continuation reaches the end of the text,
    it goes on from its beginning, as a text does that repeats itself. InputError for an ngram out of range.
    """

    reads_states: ClassVar[bool] = False
    ngram: int = 3

    def __post_init__(self) -> None:
        in_range(self.ngram, 1, MAX_NGRAM, "the tokens that prompt lookup compares")

    groups = staticmethod(no_groups)

    def __call__(self, context: DraftContext) -> DraftTokens:
        text_BL, known_B1 = context.text.tokens_BL, context.text.known_B[:, None]
        column_L = torch.arange(text_BL.shape[1], device=text_BL.device)
        same_BL, length_BL = column_L < known_B1 - 1, torch.zeros_like(text_BL)
        for back in range(self.ngram):  # does the token so far before this column equal the one so far before the last?
            last_B1 = text_BL.gather(1, (known_B1 - 1 - back).clamp(min=0))
            same_BL = same_BL & (column_L >= back) & (text_BL.roll(back, 1) == last_B1)
            length_BL += same_BL
        best_B1 = (length_BL * text_BL.shape[1] + column_L).masked_fill(length_BL == 0, -1).argmax(1, keepdim=True)
        found_B = length_BL.gather(1, best_B1).squeeze(1) > 0
        k_K = torch.arange(context.request.u_BK.shape[1], device=text_BL.device)
        after_BK = best_B1 + 1 + k_K % (known_B1 - 1 - best_B1).clamp(min=1)
        token_BK = text_BL.gather(1, after_BK.clamp(max=text_BL.shape[1] - 1))
        return DraftTokens(token_BK, torch.where(found_B, context.request.limit_B, 0))


@dataclass(frozen=True)
class FittedVocabulary:
    """A network of the same tokens but another number of ids as one with `wanted` of them; the last id of each is its mask.

    An id that it lacks it reads as its own mask, and never drafts: its logit is -inf.
    """

    denoiser: Denoiser
    own: int
    wanted: int

    def __call__(self, z_BQ: Tensor, *args: Any, **options: Any) -> Tensor:
        shared = min(self.own, self.wanted) - 1
        logits_BQV = self.denoiser(z_BQ.masked_fill(z_BQ >= shared, self.own - 1), *args, **options)
        return F.pad(logits_BQV[..., :shared], (0, self.wanted - shared), value=-torch.inf)


@dataclass(frozen=True)
class MedusaDrafter:
    """Heads on the hidden state that the last token was drawn from: the k-th predicts the token k places after that one, without having
    seen it. Medusa (Cai et al. 2401.10774).

    logits(state_BD, K) gives (B, K, V) of the first K heads; count: how many there are. InputError for a count out of range.
    """

    reads_states: ClassVar[bool] = True
    logits: Callable[[Tensor, int], Tensor]
    count: int

    def __post_init__(self) -> None:
        in_range(self.count, 1, MAX_STRIDE - 1, "the number of heads")

    groups = staticmethod(no_groups)

    def __call__(self, context: DraftContext) -> DraftTokens:
        assert context.last.state_BD is not None
        limit_B = context.request.limit_B.clamp(max=self.count)
        logits_BKV = self.logits(context.last.state_BD, int(limit_B.max()))
        return context.request.grow(lambda k, _path_BNS: logits_BKV[:, k, None], limit_B)


@dataclass(frozen=True)
class DraftModel:
    """A smaller causal network of the same vocabulary, one pass a draft token (Leviathan et al. 2211.17192, Chen et al. 2302.01318).

    make_cache(rows, positions) gives it a `RowCache`; start: its token before a text, None for nothing.
    """

    reads_states: ClassVar[bool] = False
    denoiser: Denoiser
    make_cache: Callable[[int, int], RowCache]
    start: int | None

    groups = staticmethod(no_groups)

    def __call__(self, context: DraftContext) -> DraftTokens:
        text, request, known_B = context.text, context.request, context.text.known_B
        total_B, most = text.count(self.start), int(request.limit_B.max())
        cache = self._cache(context, total_B)
        text_BL = torch.cat([text.tokens_BL, text.tokens_BL[:, :1].expand(-1, most)], 1)
        token_BK, logq = text_BL[:, :0], list[Tensor]()
        for k in range(most):
            held_B = cache.length_B
            width = int((total_B + k - held_B).max())
            index_BQ = held_B[:, None] + torch.arange(width, device=text_BL.device)
            at_BQ = index_BQ == (total_B + k - 1)[:, None]
            z_BQ, own_BQQ = read_inputs(text_BL, text.begin_B, index_BQ, self.start), causal(width, text_BL.device)
            logits_BQV = self.denoiser(z_BQ, pos_BQ=index_BQ, own_BQQ=own_BQQ.expand(len(z_BQ), -1, -1), at_BQ=at_BQ, cache=cache)
            cache.trim(total_B + k)
            score_B1V, logq_B1V = request.draw.scores(logits_BQV[at_BQ][:, None], request.u_BK[:, k : k + 1])
            put(text_BL, known_B + k, score_B1V.argmax(-1), torch.ones_like(known_B))
            token_BK = torch.cat([token_BK, score_B1V.argmax(-1)], 1)
            logq += [] if logq_B1V is None else [logq_B1V]
        return DraftTokens(token_BK, request.limit_B, torch.cat(logq, 1) if logq else None)

    def _cache(self, context: DraftContext, total_B: Tensor) -> RowCache:
        """Its KV cache without the rejected draft tokens that it has read, and without a window that the text has left."""
        memory, begin_B = context.memory, context.text.begin_B
        if memory.cache is None or memory.begin_B is None:
            memory.cache, memory.begin_B = self.make_cache(len(begin_B), context.last.capacity), begin_B
        memory.cache.trim(torch.minimum(memory.cache.length_B, total_B - 1).masked_fill(begin_B != memory.begin_B, 0))
        memory.begin_B = begin_B
        return memory.cache


def _limits(context: DraftContext, start: int | None) -> Tensor:
    """How many tokens each row may draft (B,) over the cache of its text: none where that lacks a token, as it does in a row that enters a
    window."""
    read_B = context.last.cache.length_B == context.text.count(start) - 1
    return torch.where(read_B, context.request.limit_B, 0)


@dataclass(frozen=True)
class SelfDraft:
    """The network itself with quantized weights, one forward pass a draft token, on the KV cache that it wrote unquantized.

    So nothing is read twice: keys and values of draft tokens are forgotten, and written anew by the pass that verifies. QSpec (Zhao et al.
    2410.11305) shares them so, QuantSpec (Tiwari et al. 2502.10424) quantizes them too. start: as of the network. lead: of a draft token
    over the second choice, in nats; none is drafted after one whose lead is smaller, which quantization may have turned. InputError for a
    lead out of range.
    """

    reads_states: ClassVar[bool] = False
    denoiser: Denoiser
    start: int | None
    lead: float = 0.05

    def __post_init__(self) -> None:
        in_range(self.lead, 0, MAX_LEAD_NATS, "the lead in nats")

    groups = staticmethod(no_groups)

    def __call__(self, context: DraftContext) -> DraftTokens:
        text, request, cache = context.text, context.request, context.last.cache
        held_B, limit_B = cache.length_B, _limits(context, self.start)
        token_B1 = text.inputs(held_B[:, None], self.start)
        own_BQQ = torch.ones(len(held_B), 1, 1, dtype=torch.bool, device=held_B.device)
        tokens, logq = [token_B1[:, :0]], list[Tensor]()
        count_B, going_B = torch.zeros_like(limit_B), limit_B > 0
        while bool(going_B.any()):
            logits_B1V = self.denoiser(token_B1, pos_BQ=cache.length_B[:, None], own_BQQ=own_BQQ, cache=cache)
            score_B1V, logq_B1V = request.draw.scores(logits_B1V, request.u_BK[:, len(tokens) - 1, None])
            best_B12, choice_B12 = score_B1V.topk(2, -1)
            token_B1, lead_B1 = choice_B12[..., 0], best_B12[..., 0] - best_B12[..., 1]
            tokens.append(token_B1)
            logq += [] if logq_B1V is None else [logq_B1V]
            count_B += going_B
            going_B = going_B & (count_B < limit_B) & (lead_B1 >= self.lead).squeeze(1)
        cache.trim(held_B)
        return DraftTokens(torch.cat(tokens, 1), count_B, torch.cat(logq, 1) if logq else None)


@dataclass(frozen=True)
class BlockDrafter:
    """The network itself, which denoises a block: one forward pass over the last token and masks that read one another fully, each for its
    own token. The text is read causally, as when it verifies (the self-speculation of Nemotron-Labs-Diffusion).

    Keys and values of the block are forgotten, for the text reads no block. start: as of the network.
    """

    reads_states: ClassVar[bool] = False
    own_passes: ClassVar[int] = 1
    denoiser: Denoiser
    mask_id: int
    start: int | None

    groups = staticmethod(no_groups)

    def __call__(self, context: DraftContext) -> DraftTokens:
        text, request, cache = context.text, context.request, context.last.cache
        held_B, limit_B = cache.length_B, _limits(context, self.start)
        slot_Q = torch.arange(int(limit_B.max()) + 1, device=held_B.device)
        if len(slot_Q) == 1:
            return DraftTokens.none(held_B)
        last_B1, inside_BQ = text.inputs(held_B[:, None], self.start), slot_Q <= limit_B[:, None]
        z_BQ = torch.cat([last_B1, last_B1.new_full((len(held_B), len(slot_Q) - 1), self.mask_id)], 1)
        own_BQQ = inside_BQ[:, None] | torch.eye(len(slot_Q), dtype=torch.bool, device=held_B.device)
        at_BQ = inside_BQ & (slot_Q > 0)
        logits_BQV = self.denoiser(z_BQ, pos_BQ=held_B[:, None] + slot_Q, own_BQQ=own_BQQ, at_BQ=at_BQ, cache=cache)
        cache.trim(held_B)
        return request.grow(lambda k, _path_BNS: logits_BQV[:, 1 + k, None], limit_B)
