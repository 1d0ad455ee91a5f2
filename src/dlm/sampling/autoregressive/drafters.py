"""Drafters: where draft tokens come from. Masks in the same forward pass, heads, the text so far, a smaller or quantized network.

Shapes: B rows, L columns of the canvas, K proposals, M masks of a group, G groups, Q inputs of one call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.errors import InputError
from dlm.protocols import Denoiser
from dlm.sampling.autoregressive.protocols import DraftTokens, Round, RowCache
from dlm.sampling.draw import race

LAYOUTS = ("tree", "restart")


def inputs(text_BL: Tensor, begin_B: Tensor, index_BQ: Tensor, start: int | None) -> Tensor:
    """What a network reads at these indices of each row's window: the start token if it has one, then the text."""
    shift = 0 if start is None else 1
    token_BQ = text_BL.gather(1, (begin_B[:, None] + index_BQ - shift).clamp(0, text_BL.shape[1] - 1))
    return token_BQ if start is None else token_BQ.masked_fill(index_BQ == 0, start)


def put(text_BL: Tensor, known_B: Tensor, token_BK: Tensor, count_B: Tensor) -> None:
    """Write the first count_B tokens of each row after its known columns."""
    row, k = (torch.arange(token_BK.shape[1], device=text_BL.device) < count_B[:, None]).nonzero(as_tuple=True)
    text_BL[row, known_B[row] + k] = token_BK[row, k]


def causal(length: int, device: torch.device) -> Tensor:
    """bool (Q, Q)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def no_groups(count_B: Tensor) -> Tensor:
    """For proposers that add nothing to the call."""
    return count_B.new_zeros(len(count_B), 0)


def tokens_per_call(layout: str, stride: int, acceptance: float) -> float:
    """Tokens that a call commits if every proposal is accepted with this chance (I-DLM, arXiv 2604.11035, and without its restart)."""
    reach = [acceptance**k for k in range(stride)]  # the chance that the first k are accepted
    if layout == "tree":
        return sum(reach)
    return (1 + sum(reach[:-1])) / (2 - reach[-1]) if stride > 1 else 1.0


@dataclass(frozen=True)
class MaskDrafter:
    """The network's own guesses: masks in the call that verifies the last ones (introspective strided decoding, I-DLM).

    A group of stride - 1 masks stands for the token after a prefix of the proposals, still unknown, and those after it; each reads the
    prefix and the masks before it in its group. `restart`, as published: one group, after all proposals, so that a rejection leaves no
    guess and the next call proposes anew; 2N - 1 positions a call. `tree`: a group after every prefix, so that there is always one; N^2.
    chain(slot, state_BD, before_BS): logits (B, V) of the masks of a slot once the tokens of the places up to theirs are drawn
    (`dlm.adapters.chain`). Without, each mask is drawn from as if the others were unknown.
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

    def __call__(self, round: Round) -> DraftTokens:
        most_B = torch.where(round.guessed_B, round.most_B, 0)
        last_B1 = round.text_BL.gather(1, (round.known_B - 1).clamp(min=0)[:, None])

        def law(slot: int, path_BNS: Tensor) -> Tensor:
            if self.chain is None:
                return round.guess_BMX[:, slot, None]
            (rows, paths), state_BD = path_BNS.shape[:2], round.guess_BMX[:, slot]
            before_BNS = torch.cat([last_B1[:, None].expand(-1, paths, -1), path_BNS], 2)
            logits_NV = self.chain(slot, state_BD.repeat_interleave(paths, 0), before_BNS.flatten(0, 1))
            return logits_NV.view(rows, paths, -1)

        return round.grow(law, most_B)

    @classmethod
    def cheapest(cls, seconds: Callable[[Sequence[int]], Sequence[float]], stride: int, acceptance: float, **options: Any) -> MaskDrafter:
        """The layout with more tokens a second at this acceptance. seconds: what calls of so many positions take."""
        taken = dict(zip(LAYOUTS, seconds([stride**2, 2 * stride - 1]), strict=True))
        return cls(max(LAYOUTS, key=lambda layout: tokens_per_call(layout, stride, acceptance) / taken[layout]), **options)


@dataclass(frozen=True)
class PromptLookup:
    """Prompt lookup: what followed when the last tokens stood in the text before, up to `ngram` of them, the latest place of the longest.

    Saxena, prompt-lookup-decoding, 2023; `ngram` in vLLM. Where that place is so near that its continuation reaches the end of the text,
    it goes on from its beginning, as a text does that repeats itself.
    """

    reads_states: ClassVar[bool] = False
    ngram: int = 3

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise InputError(f"prompt lookup compares 1 token or more, got {self.ngram}")

    groups = staticmethod(no_groups)

    def __call__(self, round: Round) -> DraftTokens:
        text_BL, known_B1 = round.text_BL, round.known_B[:, None]
        column_L = torch.arange(text_BL.shape[1], device=text_BL.device)
        same_BL, length_BL = column_L < known_B1 - 1, torch.zeros_like(text_BL)
        for back in range(self.ngram):  # does the token so far before this column equal the one so far before the last?
            last_B1 = text_BL.gather(1, (known_B1 - 1 - back).clamp(min=0))
            same_BL = same_BL & (column_L >= back) & (text_BL.roll(back, 1) == last_B1)
            length_BL += same_BL
        best_B1 = (length_BL * text_BL.shape[1] + column_L).masked_fill(length_BL == 0, -1).argmax(1, keepdim=True)
        found_B = length_BL.gather(1, best_B1).squeeze(1) > 0
        k_K = torch.arange(round.u_BK.shape[1], device=text_BL.device)
        after_BK = best_B1 + 1 + k_K % (known_B1 - 1 - best_B1).clamp(min=1)
        return DraftTokens(text_BL.gather(1, after_BK.clamp(max=text_BL.shape[1] - 1)), torch.where(found_B, round.most_B, 0))


@dataclass(frozen=True)
class FittedVocabulary:
    """A network of the same tokens but another number of ids as one with `wanted` of them; the last id of each is its mask.

    An id that it lacks it reads as its own mask, and never proposes: what has no logit is -inf.
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
    """Guesses of heads on the hidden state that the last token was drawn from: the k-th says which token stands k places after that one,
    without having seen it. Medusa (Cai et al. 2401.10774).

    logits(state_BD, K) gives (B, K, V) of the first K heads; count: how many there are.
    """

    reads_states: ClassVar[bool] = True
    logits: Callable[[Tensor, int], Tensor]
    count: int

    groups = staticmethod(no_groups)

    def __call__(self, round: Round) -> DraftTokens:
        assert round.state_BD is not None
        most_B = round.most_B.clamp(max=self.count)
        logits_BKV = self.logits(round.state_BD, int(most_B.max()))
        return round.grow(lambda k, path_BNS: logits_BKV[:, k, None], most_B)


@dataclass(frozen=True)
class DraftModel:
    """A smaller causal network of the same vocabulary, one call a proposal (Leviathan et al. 2211.17192, Chen et al. 2302.01318).

    make_cache(rows, positions) gives it a `RowCache`; start: what it reads before a text, None for nothing.
    """

    reads_states: ClassVar[bool] = False
    denoiser: Denoiser
    make_cache: Callable[[int, int], RowCache]
    start: int | None

    groups = staticmethod(no_groups)

    def __call__(self, round: Round) -> DraftTokens:
        text_BL, begin_B, most = round.text_BL, round.begin_B, int(round.most_B.max())
        rows, device, known_B = len(text_BL), text_BL.device, round.known_B
        if "cache" not in round.memory:
            round.memory.update(cache=self.make_cache(rows, round.capacity), begin=begin_B)
        cache: RowCache = round.memory["cache"]
        total_B = known_B - begin_B + (self.start is not None)  # inputs that are known
        # it has read its own proposals: those that were not accepted are forgotten, and all of a window that was left
        kept_B = torch.minimum(cache.length_B, total_B - 1).masked_fill(begin_B != round.memory["begin"], 0)
        cache.trim(kept_B)
        round.memory["begin"] = begin_B
        text_BL = torch.cat([text_BL, text_BL[:, :1].expand(-1, most)], 1)
        token_BK, logq_BKV = torch.zeros(rows, 0, dtype=torch.long, device=device), None
        for k in range(most):
            held_B = cache.length_B
            width = int((total_B + k - held_B).max())
            index_BQ = held_B[:, None] + torch.arange(width, device=device)
            at_BQ = index_BQ == (total_B + k - 1)[:, None]
            z_BQ, own_BQQ = inputs(text_BL, begin_B, index_BQ, self.start), causal(width, device).expand(rows, -1, -1)
            logits_BQV = self.denoiser(z_BQ, pos_BQ=index_BQ, own_BQQ=own_BQQ, at_BQ=at_BQ, cache=cache)
            cache.trim(total_B + k)
            logq_B1V = round.shape(logits_BQV[at_BQ][:, None])
            new_B1 = race(logq_B1V, round.u_BK[:, k : k + 1])
            put(text_BL, known_B + k, new_B1, torch.ones_like(known_B))
            token_BK = torch.cat([token_BK, new_B1], 1)
            logq_BKV = logq_B1V if logq_BKV is None else torch.cat([logq_BKV, logq_B1V], 1)
        return DraftTokens(token_BK, round.most_B, logq_BKV)


@dataclass(frozen=True)
class SelfDraft:
    """The network itself with its weights rounded, one call a proposal, on the keys and values that it wrote unrounded.

    So nothing is read twice: what the draft writes after them is forgotten, and written anew by the call that verifies. QSpec (Zhao et
    al. 2410.11305) shares them so, QuantSpec (Tiwari et al. 2502.10424) rounds them too. start: as of the network. lead: of a proposal
    over the second choice, in nats; none is made after one whose lead is smaller, which rounding may have turned.
    """

    reads_states: ClassVar[bool] = False
    denoiser: Denoiser
    start: int | None
    lead: float = 0.05

    groups = staticmethod(no_groups)

    def __call__(self, round: Round) -> DraftTokens:
        cache, rows = round.cache, len(round.text_BL)
        held_B = cache.length_B
        read_B = held_B == round.known_B - round.begin_B + (self.start is not None) - 1  # a row that enters a window is not
        most_B = torch.where(read_B, round.most_B, 0)
        token_B1 = inputs(round.text_BL, round.begin_B, held_B[:, None], self.start)
        own_BQQ = torch.ones(rows, 1, 1, dtype=torch.bool, device=token_B1.device)
        token_BK: list[Tensor] = [token_B1[:, :0]]
        logq_BKV: list[Tensor] = []
        count_B, going_B = torch.zeros_like(most_B), most_B > 0
        while bool(going_B.any()):
            logits_B1V = self.denoiser(token_B1, pos_BQ=cache.length_B[:, None], own_BQQ=own_BQQ, cache=cache)
            token_B1, lead_B1, law_B1V = round.lead(logits_B1V, round.u_BK[:, len(token_BK) - 1, None])
            token_BK.append(token_B1)
            logq_BKV += [] if law_B1V is None else [law_B1V]
            count_B += going_B
            going_B = going_B & (count_B < most_B) & (lead_B1 >= self.lead).squeeze(1)
        cache.trim(held_B)
        return DraftTokens(torch.cat(token_BK, 1), count_B, torch.cat(logq_BKV, 1) if logq_BKV else None)
