"""Speculative decoding: the text of the autoregressive sampler, several tokens a forward pass.

A forward pass reads [last token, draft tokens, groups of masks] (`network_call.py`). Draft tokens are accepted from the left up to the
first rejected one, and the token there is drawn from the target (`verification.py`). At least one token is committed, `stride` at most.
I-DLM (arXiv 2604.11035, introspective strided decoding) where masks of the same forward pass draft.
Shapes: B rows, L columns of the canvas, K draft tokens, P places (the committed text, then after each draft token), D depths, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.errors import InputError, in_range
from dlm.protocols import RNG, Denoiser
from dlm.sampling import windows
from dlm.sampling.autoregressive.committed_text import CommittedText, put
from dlm.sampling.autoregressive.draft_length import MAX_STRIDE, AdaptiveDraftLength
from dlm.sampling.autoregressive.draft_tokens import DraftTokens
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.drafters import MaskDrafter
from dlm.sampling.autoregressive.network_call import Output, VerifyingPass
from dlm.sampling.autoregressive.plain import check_continues, start_token
from dlm.sampling.autoregressive.protocols import DraftContext, Drafter, DrafterMemory, LastPass, Request, RowCache
from dlm.sampling.autoregressive.token_draw import TokenDraw
from dlm.sampling.autoregressive.verification import COUPLINGS, CommonNumbers, FreshNumbers, Verification
from dlm.sampling.batching import WrittenDistribution
from dlm.sampling.draw import Draw, check_sound
from dlm.trajectory import Canvas, Frame


@dataclass(frozen=True)
class Tally:
    """Of one forward pass: draft tokens of each row (of a tree, their depth), those accepted, tokens committed, 0 for rows that are done;
    positions read."""

    drafted_B: Tensor
    accepted_B: Tensor
    committed_B: Tensor
    positions: int


@dataclass(frozen=True)
class SpeculativeDecoder:
    """Continue prompts, rows at their own pace. make_cache(rows, positions) gives an empty `RowCache`.

    drafter: of `drafters.py`. stride: tokens that a forward pass may commit, one more than its draft tokens; 1 is plain decoding.
    coupling: `stream`, the text of `AutoregressiveSampler` with the same generators, token for token; or `ratio`, its distribution only,
    with more accepted. Both are exact up to rounding: where passes of different lengths round differently, a near-tie may fall otherwise.
    floor: the k-th draft token is made only where c^k reaches it, c the probability of the likeliest token where the last one was drawn; so
    their number follows the network's confidence. 0: always `stride` - 1. tree: of the draft tokens, by default the first choice for each
    place; others need masks or heads, and `stream`. draft_length: chooses every stride, up to `stride`, by its measured speed so far; with
    `stream`, whose text does not depend on it. start, stop, context: as of `AutoregressiveSampler`. InputError for settings out of range.
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
        in_range(self.stride, 1, MAX_STRIDE, "the stride, one more than the draft tokens,")
        in_range(self.floor, 0, 1, "the confidence floor")
        if self.coupling not in COUPLINGS:
            raise InputError(f"unknown coupling {self.coupling!r}; known: {', '.join(COUPLINGS)}")
        adaptive, stream = self.draft_length, self.coupling == "stream"
        if adaptive is not None and (not stream or adaptive.strides[-1] != self.stride):
            raise InputError("an adaptive draft length goes with the coupling stream, and up to the stride of the sampler")
        if self.tree is not None and (not stream or adaptive is not None or max(self.tree.depth) != self.stride - 1):
            raise InputError("a draft tree goes with the coupling stream and a fixed stride, one less deep than that")

    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every forward pass: the committed text, and the draft tokens after it. InputError for text after a hole."""
        for frame, _ in self.rounds(canvas, rng=rng):
            yield frame

    def rounds(self, canvas: Canvas, *, rng: RNG) -> Iterator[tuple[Frame, Tally]]:
        """The frames of `steps`, each with the counts of its forward pass."""
        run = self.begin(canvas, rng=rng)
        while bool(run.live_B.any()):
            frame = run.step()
            assert run.tally is not None
            yield frame, run.tally

    def begin(self, canvas: Canvas, *, rng: RNG) -> SpeculativeRun:
        """A run on this canvas before its first forward pass. rng: one a row. InputError for text after a hole."""
        check_continues(canvas, self.start)
        return SpeculativeRun(self, canvas, rng)

    def tree_of(self, depth: int) -> Tree:
        """The draft tree, which is a chain of this depth unless it was given."""
        return self.tree or Tree.chain(depth)

    def capacity(self, length: int) -> int:
        """Positions that the KV cache of a text of this length needs; no more than a pass may take, as compiled ones read them all."""
        nodes = len(self.tree_of(self.stride - 1))
        groups = self.drafter.groups(torch.tensor([nodes])).shape[1]
        return min(self.window, length) + (self.context if length > self.window else 0) + nodes + 2 + groups * self.stride

    def verification(self, text: CommittedText, rng: RNG) -> Verification:
        """Of a run that begins with this text."""
        draw = TokenDraw(self.draw, self.mask_id)
        if self.coupling == "ratio":
            return FreshNumbers(rng, self.stride, draw)
        return CommonNumbers(rng, text.known_B, int(text.free_BL.sum(-1).max()) + 2 * self.stride, draw)


class SpeculativeRun:
    """The state of one run (`dlm.sampling.batching`): all of it by rows, those that are done keep their place until they leave."""

    reads_first: ClassVar[bool] = True

    def __init__(self, decoder: SpeculativeDecoder, canvas: Canvas, rng: RNG) -> None:
        self.decoder, device = decoder, canvas.tokens_BT.device
        self.text = CommittedText.of(canvas, decoder.window, decoder.context, decoder.mask_id)
        self.stop_S = torch.tensor(sorted(decoder.stop), dtype=torch.long, device=device)
        self.capacity = decoder.capacity(canvas.free_BT.shape[1])
        self.cache = decoder.make_cache(len(canvas.free_BT), self.capacity)
        self.drafts, self.memory = DraftTokens.none(self.text.known_B), DrafterMemory()
        self.verification = decoder.verification(self.text, rng)
        self.forwards, self.stride = 0, decoder.stride
        self.distribution: WrittenDistribution | None = None
        self.tally: Tally | None = None

    @property
    def live_B(self) -> Tensor:
        return self.text.live_B

    @property
    def tree(self) -> Tree:
        """Of the draft tokens."""
        return self.decoder.tree_of(self.drafts.token_BK.shape[1])

    def frame(self) -> Frame:
        """The committed text, and the draft tokens after it, of a tree the first choices."""
        text, drafts, tree, open_BL = self.text, self.drafts, self.tree, self.text.open_BL
        draft_BL = torch.full_like(text.tokens_BL, -1)
        firsts = [k for k in tree.firsts if k < drafts.token_BK.shape[1]]
        put(draft_BL, text.known_B, drafts.token_BK[:, firsts], tree.tables(open_BL.device).depth_P[drafts.count_B])
        t_B = open_BL.double().sum(-1) / open_BL.shape[1]
        return Frame(text.tokens_BL.clone(), ~open_BL, t_B, self.decoder.model, self.forwards, draft_BT=draft_BL)

    @torch.no_grad()
    def step(self) -> Frame:
        """One forward pass for the rows that go on; `tally` counts its tokens."""
        self.distribution = None  # its memory is free for this pass
        decoder, live_B, adaptive, before, began = self.decoder, self.live_B, self.decoder.draft_length, self.stride, time.perf_counter()
        if adaptive is not None:
            self.stride = adaptive.choose(int(live_B.sum()))
        held_B = self.cache.length_B
        new_B = (self.text.count(decoder.start) - held_B) * live_B
        forward = VerifyingPass(decoder.denoiser, decoder.drafter, decoder.mask_id, decoder.start, self.stride - 1)
        output = forward(self.text, self.drafts, self.tree, live_B, new_B, self.cache)
        self.forwards += 1
        place_B, token_B = self.verification.verify(output.logits_BPV, self.drafts, self.text.known_B, self.tree)
        rows_B = torch.arange(len(place_B), device=place_B.device)
        check_sound(output.logits_BPV[rows_B, place_B].masked_fill(~live_B[:, None], 0.0))  # which the last tokens are drawn from
        self._commit(output, live_B, held_B + new_B, place_B, token_B)
        if decoder.stride > 1:
            self.drafts = self._draft(output, place_B)
            self.forwards += getattr(decoder.drafter, "own_passes", 0) * bool(self.drafts.token_BK.shape[1])
        if adaptive is not None and self.stride == before and int(new_B.max()) == 1:  # else it changed its stride, or read a prompt
            assert self.tally is not None
            accepted = self.tally.accepted_B[live_B].tolist()
            adaptive.record(len(accepted), before, time.perf_counter() - began, accepted)
        return self.frame()

    def _commit(self, output: Output, live_B: Tensor, read_B: Tensor, place_B: Tensor, token_B: Tensor) -> None:
        """Commit the draft tokens up to the accepted place and the token after them; the KV cache keeps the committed positions.

        read_B: positions of the cache that hold text.
        """
        text, drafts, tree, start = self.text, self.drafts, self.tree, self.decoder.start
        tables, known_B, begin_B = tree.tables(place_B.device), text.known_B, text.begin_B
        accepted_B, path_BD = tables.depth_P[place_B], tables.path_PD[place_B].clamp(max=drafts.token_BK.shape[1])
        path_BK = F.pad(F.pad(drafts.token_BK, (0, 1)).gather(1, path_BD), (0, 1))
        committed_B = text.commit(path_BK.scatter(1, accepted_B[:, None], token_B[:, None]), (accepted_B + 1) * live_B, self.stop_S)
        if not tree.is_chain:  # move the accepted path together
            self.cache.close_up(read_B, path_BD)
        # the last token is read by the next pass; a row that enters a window reads it all
        kept_B = (text.count(start) - 1).masked_fill(text.begin_B != begin_B, 0)
        self.cache.trim(torch.where(live_B, kept_B, read_B))
        self.tally = Tally(tables.depth_P[drafts.count_B] * live_B, accepted_B * live_B, committed_B, output.positions)
        logits_BPV = output.logits_BPV
        if not tree.is_chain:
            along_BP = F.pad(path_BD + 1, (1, 0)).clamp(max=logits_BPV.shape[1] - 1)
            logits_BPV = logits_BPV.gather(1, along_BP[..., None].expand(-1, -1, logits_BPV.shape[2]))
        row_N, at_N = (torch.arange(logits_BPV.shape[1], device=known_B.device) < committed_B[:, None]).nonzero(as_tuple=True)
        self.distribution = WrittenDistribution(row_N, known_B[row_N] + at_N, logits_BPV[row_N, at_N])

    def _draft(self, output: Output, place_B: Tensor) -> DraftTokens:
        """For the next pass, no more than fit into the row and its window and than the network's confidence is worth."""
        decoder, text, rows_B = self.decoder, self.text, torch.arange(len(place_B), device=place_B.device)
        u_BK = self.verification.draft_numbers(text.known_B, self.stride - 1)
        mask_BMX, masked_B = output.masks_after(place_B, self.stride - 1)
        limit_B = text.room_B()
        if decoder.floor > 0:
            confidence_B = output.logits_BPV[rows_B, place_B].float().softmax(-1).amax(-1)
            power_K = torch.arange(1, self.stride, device=place_B.device)
            limit_B = torch.minimum(limit_B, (confidence_B[:, None] ** power_K >= decoder.floor).sum(-1))
        limit_B = limit_B.clamp(0, self.stride - 1).masked_fill(text.ended_B, 0)
        state_BD = None if output.state_BPD is None else output.state_BPD[rows_B, place_B]
        request = Request(limit_B, u_BK, decoder.tree_of(self.stride - 1), TokenDraw(decoder.draw, decoder.mask_id))
        last = LastPass(mask_BMX, masked_B, state_BD, self.cache, self.capacity)
        return decoder.drafter(DraftContext(text, request, last, self.memory)).trimmed()

    def join(self, other: SpeculativeRun) -> None:
        """Take in the rows of another run of the same sampler; the other is used up. ValueError unless both or neither began."""
        self.memory.join(other.memory)
        self.text.join(other.text)
        self.cache.join(other.cache)
        self.drafts = self.drafts.join(other.drafts)
        self.verification.join(other.verification)
        self.capacity, self.distribution, self.tally = max(self.capacity, other.capacity), None, None

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone, in this order."""
        self.text.keep(rows_K)
        self.cache.keep(rows_K)
        self.memory.keep(rows_K)
        self.drafts = self.drafts.keep(rows_K)
        self.verification.keep(rows_K)
        self.distribution = self.tally = None
