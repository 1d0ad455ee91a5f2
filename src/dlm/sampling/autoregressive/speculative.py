"""Strided decoding: the text of the autoregressive sampler, several tokens a call; every proposal is verified.

A call reads [last token, proposals, groups of masks]. Its output at the last token and at each proposal is the network's own law p of the
next one, whatever stands after; so proposals are accepted from the left up to the first that does not hold, and the token there is drawn
from p. One token is committed at least, `stride` at most. I-DLM (arXiv 2604.11035) where masks in the same call propose.
Shapes: B rows, L columns of the canvas, K proposals, P places (the committed text, then after each proposal), W inputs of one call before
its masks, M masks of a group, G groups, E masks of all, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.errors import InputError
from dlm.protocols import RNG, Denoiser
from dlm.sampling import windows
from dlm.sampling.autoregressive.draft_length import AdaptiveDraftLength
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.drafters import MaskDrafter, causal, inputs, put
from dlm.sampling.autoregressive.plain import check_continues, start_token
from dlm.sampling.autoregressive.protocols import Drafter, DraftTokens, Round, RowCache
from dlm.sampling.autoregressive.verification import COUPLINGS, Fresh, Stream
from dlm.sampling.batching import Law, stacked
from dlm.sampling.draw import Draw, finishers, race, scores
from dlm.trajectory import Canvas, Frame

ROWS = ("free_BL", "text_BL", "end_B", "known_B", "begin_B", "done_B")  # what there is of each row


@dataclass(frozen=True)
class Tally:
    """What one call did: how far its proposals went in each row and how many were accepted, tokens it committed, 0 for rows that are
    done; positions read."""

    drafted_B: Tensor
    accepted_B: Tensor
    committed_B: Tensor
    positions: int


@dataclass(frozen=True)
class SpeculativeDecoder:
    """Continue prompts, rows at their own pace. make_cache(rows, positions) gives an empty `RowCache`.

    drafter: a drafter of `drafters.py`. stride: tokens that a call may commit; 1 is plain autoregression.
    coupling: `stream`, the text of `AutoregressiveSampler` with the same generators, token for token; or `ratio`, its distribution only,
    with more accepted. Both are exact up to rounding: where calls of different lengths round differently, a near-tie may fall otherwise.
    floor: the k-th proposal is made only where c^k reaches it, c the probability of the likeliest token where the last one was drawn; so
    the stride follows the network's confidence. 0: always `stride`. tree: of the proposals, by default the first choice for each place;
    others need masks or heads, and `stream`. draft_length: chooses every stride, up to `stride`, by what has paid so far; with `stream`,
    whose text does not depend on it. start, stop, context: as of `AutoregressiveSampler`.
    """

    denoiser: Denoiser
    mask_id: int
    window: int
    make_cache: Callable[[int, int], RowCache]
    drafter: Drafter = field(default_factory=MaskDrafter)
    stride: int = 4
    coupling: str = "stream"
    floor: float = 0.0
    tree: Tree | None = None
    draft_length: AdaptiveDraftLength | None = None
    draw: Draw = field(default_factory=Draw)
    context: int = 0
    model: str = ""
    start: int | None = -1
    stop: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        windows.check(self.window, self.context)
        object.__setattr__(self, "start", start_token(self.start, self.mask_id, self.context))
        if self.stride < 1 or not 0 <= self.floor <= 1:
            raise InputError(f"a stride counts from 1, and its floor lies in 0 .. 1; got {self.stride} and {self.floor}")
        if self.coupling not in COUPLINGS:
            raise InputError(f"unknown coupling {self.coupling!r}; known: {', '.join(COUPLINGS)}")
        if self.draft_length is not None and (self.coupling != "stream" or self.draft_length.strides[-1] != self.stride):
            raise InputError("an adaptive draft length goes with the coupling stream, and up to the stride of the sampler")
        if self.tree is not None and (
            self.coupling != "stream" or self.draft_length is not None or max(self.tree.depth) != self.stride - 1
        ):
            raise InputError("a tree goes with the coupling stream and a fixed stride, one less deep than that")

    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every call: the committed text, and what is proposed to follow it. InputError for text after a hole."""
        for frame, _ in self.rounds(canvas, rng=rng):
            yield frame

    def rounds(self, canvas: Canvas, *, rng: RNG) -> Iterator[tuple[Frame, Tally]]:
        """The frames of `steps`, each with what its call did."""
        run = self.begin(canvas, rng=rng)
        while bool(run.live_B.any()):
            frame = run.step()
            assert run.tally is not None
            yield frame, run.tally

    def begin(self, canvas: Canvas, *, rng: RNG) -> SpeculativeRun:
        """A run on this canvas before its first call. rng: one a row. InputError for text after a hole."""
        check_continues(canvas, self.start)
        return SpeculativeRun(self, canvas, rng)

    def _window(self, known_B: Tensor) -> Tensor:
        """Where the window begins in which the next token lies, as in `AutoregressiveSampler`."""
        return (known_B - self.context).clamp(min=0) // (self.window - self.context) * (self.window - self.context)

    def _inputs(self, run: SpeculativeRun) -> Tensor:
        """How many inputs of its window each row knows."""
        return run.known_B - run.begin_B + (self.start is not None)

    def _shape(self, logits_BKV: Tensor) -> Tensor:
        """What tokens are drawn from, of the target and of what proposes: log-probabilities with temperature and truncation."""
        logits_BKV = self._open(logits_BKV)
        return self.draw.shape(logits_BKV if self.draw.temperature == 0 else logits_BKV.log_softmax(-1))

    def _open(self, logits_BKV: Tensor) -> Tensor:
        """float32, and the mask is never drawn."""
        return logits_BKV.float().index_fill(-1, torch.tensor(self.mask_id, device=logits_BKV.device), -torch.inf)

    def _take(self, logits_BKV: Tensor, u_BK: Tensor) -> Tensor:
        """The tokens that these numbers draw, int64 (B, K)."""
        return self._open(logits_BKV).argmax(-1) if self.draw.temperature == 0 else race(self._shape(logits_BKV), u_BK)

    def _lead(self, logits_BKV: Tensor, u_BK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `_take`, how far each lies before the second choice, in nats, and what they are drawn from: None where they are certain."""
        logp_BKV = None if self.draw.temperature == 0 else self._shape(logits_BKV)
        score_BKV = self._open(logits_BKV) if logp_BKV is None else scores(logp_BKV, u_BK)
        best_BK2, token_BK2 = score_BKV.topk(2, -1)
        return token_BK2[..., 0], best_BK2[..., 0] - best_BK2[..., 1], logp_BKV

    def _grow(self, stride: int, u_BK: Tensor, law: Callable[[int, Tensor], Tensor], most_B: Tensor) -> DraftTokens:
        """As deep in each row as most_B says; see `Tree.grow`."""
        tree = self.tree or Tree.chain(stride - 1)
        token_BK, logq_BKV = tree.grow(law, self._choose, u_BK, int(most_B.max()))
        return DraftTokens(token_BK, tree.tables(most_B.device).count_D[most_B], logq_BKV)

    def _choose(self, logits_BNV: Tensor, u_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` tokens (B, N, C) that these numbers draw, or the likeliest at temperature 0; what the first is drawn from."""
        logp_BNV = self._shape(logits_BNV)
        if count == 1:
            return race(logp_BNV, u_B[:, None].expand(logp_BNV.shape[:2]))[..., None], logp_BNV
        if self.draw.temperature > 0:
            return finishers(logp_BNV, u_B, count), logp_BNV
        return self._open(logits_BNV).topk(count, -1).indices, logp_BNV

    def _read(self, run: SpeculativeRun, live_B: Tensor, new_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
        """One call: (logits at every place, of the last token and the proposals, logits of the masks, the place of each group, hidden
        states of the places, positions). Where the drafter reads states, those of the masks are in place of their logits.

        new_B: inputs that a row knows and has not read. They and its proposals lie in front, so that what is committed is a prefix.
        """
        device, (count_B, masks) = run.text_BL.device, (run.proposals.count_B * live_B, run.stride - 1)
        held_B = run.cache.length_B
        rows, width, drafts_BK = len(new_B), int((new_B + count_B).max()), run.proposals.token_BK
        w_W, at_B1, places = torch.arange(width, device=device), torch.arange(rows, device=device)[:, None], drafts_BK.shape[1] + 1
        tables = run.tree.tables(device)
        # the place in the tree of every input: 0 for text, and after it the proposals
        place_BW = (w_W - new_B[:, None] + 1).clamp(0, places - 1)
        index_BW = (held_B[:, None] + torch.minimum(w_W, new_B[:, None] - 1)).clamp(min=0)
        text_BW = inputs(run.text_BL, run.begin_B, index_BW, self.start)
        token_BW = torch.where(place_BW > 0, F.pad(drafts_BK, (1, 0)).gather(1, place_BW), text_BW)
        reads_PP = F.pad(tables.reads_PK[:places, : places - 1], (1, 0), value=True)
        reads_BPW = reads_PP[:, place_BW].transpose(0, 1) & (w_W < (new_B + count_B)[:, None])[:, None]
        after_BG = self.drafter.groups(count_B)
        after_BE = after_BG.repeat_interleave(masks, 1)
        group_E = torch.arange(after_BG.shape[1], device=device).repeat_interleave(masks)
        depth_E = torch.arange(masks, device=device).repeat(after_BG.shape[1])
        z_BQ = torch.cat([token_BW, torch.full_like(after_BE, self.mask_id)], 1)
        pos_BQ = torch.cat([index_BW + tables.depth_P[place_BW], (held_B + new_B)[:, None] + tables.depth_P[after_BE] + depth_E], 1)
        # text is causal, a proposal reads its path, and neither reads a mask; a mask reads a path, and earlier masks of its group
        reads_BEW = reads_BPW[at_B1, after_BE]
        reads_EE = (group_E[:, None] == group_E) & (depth_E <= depth_E[:, None])
        reads_BWW = causal(width, device) & reads_BPW[at_B1, place_BW] | torch.eye(width, dtype=torch.bool, device=device)
        text_BWQ = F.pad(reads_BWW, (0, len(depth_E)))
        own_BQQ = torch.cat([text_BWQ, torch.cat([reads_BEW, reads_EE.expand(rows, -1, -1)], 2)], 1)
        # logits from the last token on
        first_B = (new_B - 1).clamp(min=0)
        at_BW = (w_W >= first_B[:, None]) & (w_W < (new_B + count_B)[:, None])
        states: list[Tensor] = []
        more: dict[str, Any] = {"states": states} if self.drafter.reads_states else {}
        at_BQ = torch.cat([at_BW, (live_B[:, None] & (not more)).expand_as(after_BE)], 1)
        logits_BQV = self.denoiser(z_BQ, pos_BQ=pos_BQ, own_BQQ=own_BQQ, at_BQ=at_BQ, cache=run.cache, **more)
        at_BP = first_B[:, None] + torch.arange(places, device=device)
        at = at_B1, at_BP.clamp(max=z_BQ.shape[1] - 1)
        guess_BEX = (states[0] if states else logits_BQV)[:, width:]
        return logits_BQV[at], guess_BEX, after_BG, states[0][at] if states else None, z_BQ.shape[1]

    def _propose(
        self,
        run: SpeculativeRun,
        logits_BKV: Tensor,
        guess_BEX: Tensor,
        hit_BG: Tensor,
        place_B: Tensor,
        u_BK: Tensor,
        state_BKD: Tensor | None,
    ) -> DraftTokens:
        """For the next call, no more than fit into its row and window and than the network's confidence is worth."""
        rows_B, masks_M = torch.arange(len(place_B), device=place_B.device), torch.arange(run.stride - 1, device=place_B.device)
        if hit_BG.shape[1]:
            guess_BEX = guess_BEX[rows_B[:, None], hit_BG.int().argmax(1, keepdim=True) * (run.stride - 1) + masks_M]
        most_B = torch.minimum(run.end_B, run.begin_B + self.window) - run.known_B - 1
        if self.floor > 0:
            confidence_B = logits_BKV[rows_B, place_B].float().softmax(-1).amax(-1)
            most_B = torch.minimum(most_B, (confidence_B[:, None] ** (masks_M + 1) >= self.floor).sum(-1))
        most_B = most_B.clamp(0, run.stride - 1).masked_fill(run.done_B, 0)
        state_BD = None if state_BKD is None else state_BKD[rows_B, place_B]
        known, guess = (run.text_BL, run.begin_B, run.known_B, most_B, u_BK), (guess_BEX, hit_BG.any(-1), self._shape, self._lead)
        grow = partial(self._grow, run.stride, u_BK)
        proposals = self.drafter(Round(*known, *guess, grow, run.capacity, run.cache, run.memory, state_BD))
        most = int(proposals.count_B.max())
        logq_BKV = proposals.logq_BKV
        return DraftTokens(proposals.token_BK[:, :most], proposals.count_B, None if logq_BKV is None else logq_BKV[:, :most])


class SpeculativeRun:
    """The state of one run (`dlm.sampling.batching`): all of it by rows, those that are done keep their place until they leave."""

    reads_first: ClassVar[bool] = True

    def __init__(self, sampler: SpeculativeDecoder, canvas: Canvas, rng: RNG) -> None:
        (rows, length), stride, window = canvas.free_BT.shape, sampler.stride, sampler.window
        self.sampler, self.free_BL = sampler, canvas.free_BT
        self.text_BL = torch.where(self.free_BL, sampler.mask_id, canvas.tokens_BT)
        self.end_B = canvas.valid_BT.sum(-1)
        self.known_B = self.end_B - self.free_BL.sum(-1)
        self.begin_B = sampler._window(self.known_B)
        self.done_B = torch.zeros_like(self.free_BL[:, 0])
        self.stop_S = torch.tensor(sorted(sampler.stop), dtype=torch.long, device=self.text_BL.device)
        nodes = stride - 1 if sampler.tree is None else len(sampler.tree)
        groups = sampler.drafter.groups(torch.tensor([nodes])).shape[1]  # no more room than a call may take: compiled ones read it all
        self.capacity = min(window, length) + (sampler.context if length > window else 0) + nodes + 2 + groups * stride
        self.cache = sampler.make_cache(rows, self.capacity)
        self.proposals = DraftTokens(canvas.tokens_BT[:, :0], torch.zeros_like(self.known_B))
        self.memory: dict[str, Any] = {}
        most = int(self.free_BL.sum(-1).max()) + 2 * stride
        stream = sampler.coupling == "stream"
        self.numbers: Any = Stream(rng, self.known_B, most, sampler._take) if stream else Fresh(rng, stride, sampler._shape)
        self.forwards, self.stride = 0, stride
        self.law: Law | None = None
        self.tally: Tally | None = None

    @property
    def tree(self) -> Tree:
        """Of what is proposed now."""
        return self.sampler.tree or Tree.chain(self.proposals.token_BK.shape[1])

    @property
    def live_B(self) -> Tensor:
        return (self.known_B < self.end_B) & ~self.done_B

    def frame(self) -> Frame:
        """The committed text, and what is proposed to follow it, of a tree the first choices."""
        text_BL = self.text_BL
        open_BL = self.free_BL & (torch.arange(text_BL.shape[1], device=text_BL.device) >= self.known_B[:, None])
        proposed_BL = torch.full_like(text_BL, -1)
        token_BK, tree = self.proposals.token_BK, self.tree
        firsts = [k for k in tree.firsts if k < token_BK.shape[1]]
        put(proposed_BL, self.known_B, token_BK[:, firsts], tree.tables(text_BL.device).depth_P[self.proposals.count_B])
        t_B = open_BL.double().sum(-1) / open_BL.shape[1]
        return Frame(text_BL.clone(), ~open_BL, t_B, self.sampler.model, self.forwards, proposed_BT=proposed_BL)

    @torch.no_grad()
    def step(self) -> Frame:
        """One network call for the rows that have something to do; `tally` says what it did."""
        sampler, live_B, known_B = self.sampler, self.live_B, self.known_B
        proposals, tree, held_B = self.proposals, self.tree, self.cache.length_B
        began, before, draft_length = time.perf_counter(), self.stride, sampler.draft_length
        if draft_length is not None:
            self.stride = draft_length.choose(int(live_B.sum()))
        new_B = (sampler._inputs(self) - held_B) * live_B
        logits_BKV, guess_BEX, after_BG, state_BKD, positions = sampler._read(self, live_B, new_B)
        self.forwards += 1
        place_B, token_B = self.numbers.verify(logits_BKV, proposals, known_B, tree)
        tables = tree.tables(place_B.device)
        taken_B, path_BD = tables.depth_P[place_B], tables.path_PD[place_B].clamp(max=proposals.token_BK.shape[1])
        # commit the proposals that hold and the token after them, up to one that ends the text
        new_BK = F.pad(F.pad(proposals.token_BK, (0, 1)).gather(1, path_BD), (0, 1)).scatter(1, taken_B[:, None], token_B[:, None])
        ends_BK = torch.isin(new_BK, self.stop_S) & (torch.arange(new_BK.shape[1], device=new_BK.device) <= taken_B[:, None])
        ended_B = ends_BK.any(-1) & live_B
        committed_B = torch.where(live_B, torch.where(ended_B, ends_BK.int().argmax(-1), taken_B) + 1, 0)
        put(self.text_BL, known_B, new_BK, committed_B)
        self.known_B, self.done_B = known_B + committed_B, self.done_B | ended_B
        # keep what is committed, but for the last token, which the next call reads; a row that enters a window reads it all
        begin_B, self.begin_B = self.begin_B, sampler._window(self.known_B)
        kept_B = (sampler._inputs(self) - 1).masked_fill(self.begin_B != begin_B, 0)
        if not tree.is_chain:  # what holds is put together
            self.cache.close_up(held_B + new_B, path_BD)
        self.cache.trim(torch.where(live_B, kept_B, held_B))
        self.tally = Tally(tables.depth_P[proposals.count_B] * live_B, taken_B * live_B, committed_B, positions)
        along_BP = F.pad(path_BD + 1, (1, 0)).clamp(max=logits_BKV.shape[1] - 1)
        logits_BLV = logits_BKV.gather(1, along_BP[..., None].expand(-1, -1, logits_BKV.shape[2])) if not tree.is_chain else logits_BKV
        self.law = Law(live_B.nonzero().squeeze(-1), known_B[live_B], logits_BLV[live_B])
        if sampler.stride > 1:
            u_BK = self.numbers.fresh(self.known_B, self.stride - 1)
            self.proposals = sampler._propose(self, logits_BKV, guess_BEX, after_BG == place_B[:, None], place_B, u_BK, state_BKD)
        if draft_length is not None and self.stride == before and int(new_B.max()) == 1:  # else it changed its stride, or read a prompt
            taken = taken_B[live_B].tolist()
            draft_length.saw(len(taken), before, time.perf_counter() - began, taken)
        return self.frame()

    def join(self, other: SpeculativeRun) -> None:
        """Take in the rows of another run of the same sampler; the other is used up. ValueError unless both or neither began."""
        if self.memory.keys() != other.memory.keys():
            raise ValueError("what proposes knows the rows of one run alone: let them take their first step by themselves")
        for name in ROWS:
            setattr(self, name, stacked(getattr(self, name), getattr(other, name), self.sampler.mask_id if name == "text_BL" else 0))
        self.cache.join(other.cache)
        for name, value in self.memory.items():
            if isinstance(value, Tensor):
                self.memory[name] = torch.cat([value, other.memory[name]])
            else:  # the cache of a draft model
                value.join(other.memory[name])
        ours, theirs = self.proposals, other.proposals
        logq_BKV = None
        if ours.logq_BKV is not None or theirs.logq_BKV is not None:
            logq_BKV = stacked(self._logq(ours, theirs), self._logq(theirs, ours))
        self.proposals = DraftTokens(stacked(ours.token_BK, theirs.token_BK), stacked(ours.count_B, theirs.count_B), logq_BKV)
        self.numbers.join(other.numbers)
        self.capacity, self.law, self.tally = max(self.capacity, other.capacity), None, None

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone, in this order."""
        for name in ROWS:
            setattr(self, name, getattr(self, name)[rows_K])
        self.cache.keep(rows_K)
        for name, value in self.memory.items():
            if isinstance(value, Tensor):
                self.memory[name] = value[rows_K]
            else:
                value.keep(rows_K)
        count_B, logq_BKV = self.proposals.count_B[rows_K], self.proposals.logq_BKV
        most = int(count_B.max()) if len(count_B) else 0
        token_BK = self.proposals.token_BK[rows_K, :most]
        self.proposals = DraftTokens(token_BK, count_B, None if logq_BKV is None else logq_BKV[rows_K, :most])
        self.numbers.keep(rows_K)
        self.law = self.tally = None

    @staticmethod
    def _logq(mine: DraftTokens, other: DraftTokens) -> Tensor:
        """Of proposals that were not drawn, in a batch with some that were: log q = 0 at the token."""
        if mine.logq_BKV is not None:
            return mine.logq_BKV
        assert other.logq_BKV is not None
        return F.one_hot(mine.token_BK, other.logq_BKV.shape[-1]).to(other.logq_BKV).log()
