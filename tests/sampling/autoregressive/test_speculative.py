"""Strided decoding writes the text of the plain sampler, or one of its law, in fewer calls, whatever proposes.

Shapes: B rows, L columns, K proposals, Q positions of one call, V vocabulary, S = V^T sequences.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dlm
from bases import publish, transformer
from conftest import Dlm, make_model
from dlm.adapters import lora, medusa
from dlm.adapters.chain import Chain
from dlm.errors import InputError
from dlm.inference import quantize
from dlm.language_model import load
from dlm.models.cache import RaggedCache
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.sampling.autoregressive.committed_text import CommittedText
from dlm.sampling.autoregressive.draft_length import AdaptiveDraftLength, tokens_per_forward
from dlm.sampling.autoregressive.draft_tokens import DraftTokens
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.drafters import (
    DraftModel,
    FittedVocabulary,
    MaskDrafter,
    MedusaDrafter,
    PromptLookup,
    SelfDraft,
)
from dlm.sampling.autoregressive.plain import AutoregressiveSampler
from dlm.sampling.autoregressive.protocols import DraftContext, LastPass, Request
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.autoregressive.token_draw import TokenDraw
from dlm.sampling.autoregressive.verification import accept_by_ratio
from dlm.sampling.draw import Draw, categorical, generators
from dlm.trajectory import Canvas, Frame, Trajectory
from oracle import Tiny, chi_square_of_counts, chi_square_p

MASK, WINDOW, CONTEXT = 9, 12, 4
PROMPTS = [[1, 2, 3], [], [4] * 11, [5] * 12, [6, 7] * 9]
DRAWS = [Draw(), Draw(0.0), Draw(0.7, top_k=5, top_p=0.9)]


def network(seed: int = 0, **changes: object) -> Transformer:
    sizes = {"vocab_size": MASK + 1, "window": WINDOW, "layers": 2, "heads": 4, "kv_heads": 2, "width": 32, "attention": "causal"}
    made, rng = Transformer(TransformerConfig(**(sizes | changes))), torch.Generator().manual_seed(seed)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=rng)
    return made.eval().requires_grad_(False)


def guessing(made: Transformer, count: int = 3) -> MedusaDrafter:
    """Heads that say something of their own."""
    found = medusa.Heads(made, medusa.HeadsConfig(count)).requires_grad_(False)
    for parameter in found.parameters():
        parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    return MedusaDrafter(found, count)


def chained(made: Transformer, slots: int = 4) -> Callable[[int, Tensor, Tensor], Tensor]:
    """A chain that says something of its own."""
    found = Chain(slots, made.config.width, 8, torch.Generator().manual_seed(3)).requires_grad_(False)
    found.down.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(4))
    return lambda slot, state_BD, before_BS: made.read_out(found(slot, state_BD, F.embedding(before_BS, made.embed.weight)))


BASE, SMALL = network(), network(1, layers=1)
DRAFTERS: dict[str, Any] = {
    "tree": MaskDrafter("tree"),
    "restart": MaskDrafter("restart"),
    "chain": MaskDrafter(chain=chained(BASE)),
    "chain, restart": MaskDrafter("restart", chained(BASE)),
    "lookup": PromptLookup(),
    "draft": DraftModel(SMALL, SMALL.ragged_cache, MASK),
    "heads": guessing(BASE),
    "itself": DraftModel(BASE, BASE.ragged_cache, MASK),  # nearly everything holds
    "rounded": SelfDraft(quantize.quantized_copy(BASE, 4), MASK),
}
BRANCHES = {"tree": 9, "chain": 14, "heads": 7}  # nodes of a tree of candidates
DRAFTERS |= {f"{name}, {nodes} nodes": (DRAFTERS[name], nodes) for name, nodes in BRANCHES.items()}


def canvas_of(rows: Sequence[Sequence[int]], new: int) -> Canvas:
    return Canvas.from_rows([[*row, *[None] * new] for row in rows], fill=MASK)


def decoder(drafter: Any, stride: int = 4, made: Any = BASE, **options: Any) -> SpeculativeDecoder:
    options = {"context": CONTEXT, "model": "ar"} | options
    if isinstance(drafter, tuple):
        drafter, nodes = drafter
        if stride > 1 and options.get("coupling") != "ratio" and "draft_length" not in options:  # which have no trees
            options["tree"] = Tree.likeliest(nodes, stride - 1, MASK)
    return SpeculativeDecoder(made, MASK, WINDOW, getattr(made, "ragged_cache", BASE.ragged_cache), drafter, stride, **options)


@lru_cache(maxsize=64)
def plain(prompt: tuple[int, ...], new: int, seed: int, draw: Draw, stop: frozenset[int] = frozenset(), start: int | None = -1) -> Frame:
    sampler = AutoregressiveSampler(BASE, MASK, WINDOW, BASE.cache, draw, CONTEXT, start=start, stop=stop)
    *_, frame = sampler.steps(canvas_of([prompt], new), rng=generators(seed, 1))
    return frame


def assert_plain(frame: Frame, prompts: Sequence[Sequence[int]], new: int, seed: int, draw: Draw, **options: Any) -> None:
    for row, prompt in enumerate(prompts):
        alone, length = plain(tuple(prompt), new, seed + row, draw, **options), len(prompt) + new
        assert torch.equal(frame.tokens_BT[row, :length], alone.tokens_BT[0]), (row, prompt)
        assert torch.equal(frame.settled_BT[row, :length], alone.settled_BT[0]), (row, prompt)


# --- the same text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_text_is_that_of_the_plain_sampler(name: str, stride: int, draw: Draw) -> None:
    """Rows of different prompts, through several windows, in one batch: each the text of the plain sampler alone."""
    for new, seed in ((25, 3), (5, 11)):
        frames = list(decoder(DRAFTERS[name], stride, draw=draw).steps(canvas_of(PROMPTS, new), rng=generators(seed, len(PROMPTS))))
        assert_plain(frames[-1], PROMPTS, new, seed, draw)
        assert len(frames) == frames[-1].forwards <= new
        assert stride > 1 or len(frames) == new


@pytest.mark.parametrize("name", DRAFTERS)
def test_many_seeds(name: str) -> None:
    prompts = [[1, 2]] * 40
    *_, frame = decoder(DRAFTERS[name], 3).steps(canvas_of(prompts, 9), rng=generators(100, 40))
    assert_plain(frame, prompts, 9, 100, Draw())
    assert len(frame.tokens_BT.unique(dim=0)) > 30


@pytest.mark.parametrize("draw", DRAWS[:2], ids=str)
@pytest.mark.parametrize("name", ["tree", "restart", "lookup", "itself", "rounded"])
def test_a_base_without_start_token(name: str, draw: Draw) -> None:
    own = {"itself": DraftModel(BASE, BASE.ragged_cache, None), "rounded": SelfDraft(quantize.quantized_copy(BASE, 8), None)}
    drafter = own.get(name, DRAFTERS[name])
    prompts = [[1, 2, 3], [4], [5] * 14]
    *_, frame = decoder(drafter, draw=draw, start=None).steps(canvas_of(prompts, 20), rng=generators(3, 3))
    assert_plain(frame, prompts, 20, 3, draw, start=None)


@pytest.mark.parametrize("coupling", ["stream", "ratio"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_does_not_depend_on_the_coupling(name: str, coupling: str) -> None:
    *_, frame = decoder(DRAFTERS[name], draw=Draw(0.0), coupling=coupling).steps(canvas_of(PROMPTS, 20), rng=generators(0, 5))
    assert_plain(frame, PROMPTS, 20, 0, Draw(0.0))


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_text_ends_at_its_end_token(name: str) -> None:
    stop, ended = frozenset({3, 8}), 0
    *_, frame = decoder(DRAFTERS[name], stop=stop).steps(canvas_of(PROMPTS, 30), rng=generators(3, 5))
    assert_plain(frame, PROMPTS, 30, 3, Draw(), stop=stop)
    for row, prompt in enumerate(PROMPTS):
        new = frame.tokens_BT[row, len(prompt) : len(prompt) + 30].tolist()
        ends = [j for j, token in enumerate(new) if token in stop]
        assert len(ends) <= 1
        assert all(token == MASK for token in new[ends[0] + 1 :] if ends)
        ended += bool(ends and ends[0] < 29)
    assert ended >= 3


@pytest.mark.parametrize("name", DRAFTERS)
def test_ratio_rows_are_as_each_alone(name: str) -> None:
    sampler = decoder(DRAFTERS[name], coupling="ratio", floor=0.2)
    *_, together = sampler.steps(canvas_of(PROMPTS, 25), rng=generators(3, 5))
    for row, prompt in enumerate(PROMPTS):
        *_, alone = sampler.steps(canvas_of([prompt], 25), rng=generators(3 + row, 1))
        assert torch.equal(alone.tokens_BT[0], together.tokens_BT[row, : len(prompt) + 25]), row


@pytest.mark.parametrize("name", DRAFTERS)
def test_frames_show_committed_text_and_tallies_add_up(name: str) -> None:
    canvas, committed_B = canvas_of(PROMPTS, 20), torch.zeros(5, dtype=torch.long)
    before = None
    for forwards, (frame, tally) in enumerate(decoder(DRAFTERS[name]).rounds(canvas, rng=generators(3, 5)), 1):
        assert frame.forwards == forwards
        assert frame.model == "ar"
        assert tally.positions >= 1
        assert torch.equal((frame.tokens_BT == MASK) & canvas.valid_BT, ~frame.settled_BT)
        assert (tally.accepted_B <= tally.drafted_B).all()
        assert (tally.drafted_B <= 3).all()
        assert frame.proposed_BT is not None
        assert frame.settled_BT[frame.proposed_BT == MASK].all()
        if before is not None:  # what a call verifies is what the frame before it showed
            assert torch.equal((before.proposed_BT >= 0).sum(1), tally.drafted_B)
            shown_B = (before.proposed_BT == frame.tokens_BT).sum(1)  # of a tree, the first choices
            assert torch.equal(shown_B, tally.accepted_B) or (", " in name and (shown_B <= tally.accepted_B).all())
        assert torch.equal(tally.committed_B, torch.where(tally.committed_B > 0, tally.accepted_B + 1, 0))
        if before is not None:
            assert torch.equal(frame.tokens_BT[before.settled_BT], before.tokens_BT[before.settled_BT])
            assert (frame.t_B <= before.t_B).all()
        committed_B, before = committed_B + tally.committed_B, frame
    assert committed_B.tolist() == [20] * 5
    assert before is not None
    assert before.settled_BT.all()


# --- the same law ------------------------------------------------------------------------------------------------

TINY = Tiny(3, 4)
ROWS = 6000


@lru_cache(maxsize=4)
def tiny_network(seed: int) -> Transformer:
    return network(seed, vocab_size=TINY.vocab + 1, window=TINY.length, width=16, heads=2, kv_heads=1)


def tiny_law(draw: Draw) -> Tensor:
    """The probability of every sequence by the plain chain, enumerated."""
    start_S1 = torch.full_like(TINY.x_ST[:, :1], TINY.mask_id)
    logits_STV = tiny_network(0)(torch.cat([start_S1, TINY.x_ST[:, :-1]], 1))
    logits_STV[..., TINY.mask_id] = -torch.inf
    return draw.shape(logits_STV.log_softmax(-1)).gather(2, TINY.x_ST[..., None]).squeeze(-1).sum(-1).exp()


def tiny_samples(drafter: Any, draw: Draw, stride: int, coupling: str = "ratio") -> Tensor:
    made = tiny_network(0)
    sampler = SpeculativeDecoder(made, TINY.mask_id, TINY.length, made.ragged_cache, drafter, stride, coupling, draw=draw)
    *_, frame = sampler.steps(Canvas.from_rows([[None] * TINY.length] * ROWS, fill=TINY.mask_id), rng=generators(0, ROWS))
    return frame.tokens_BT


class Sometimes:
    """Certain drafts, not drawn: the token after the last one, counted round."""

    reads_states = False

    def groups(self, count_B: Tensor) -> Tensor:
        return count_B.new_zeros(len(count_B), 0)

    def __call__(self, context: DraftContext) -> DraftTokens:
        last_B1 = context.text.tokens_BL.gather(1, context.text.known_B[:, None] - 1)
        drafts_BK = (last_B1 + 1 + torch.arange(context.request.u_BK.shape[1])) % TINY.vocab
        return DraftTokens(drafts_BK, context.request.limit_B)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [Draw(), Draw(0.6), Draw(1.2, top_p=0.8), Draw(top_k=2)], ids=str)
@pytest.mark.parametrize("name", ["tree", "restart", "chain", "lookup", "draft", "rounded", "heads", "certain"])
def test_ratio_has_the_law_of_the_plain_chain(name: str, draw: Draw) -> None:
    """Temperature and truncation on both sides; a random network proposes badly, so that most proposals are tested and many fall."""
    small = tiny_network(1)
    own = {"draft": DraftModel(small, small.ragged_cache, TINY.mask_id), "heads": guessing(tiny_network(0)), "certain": Sometimes()}
    own |= {
        "chain": MaskDrafter(chain=chained(tiny_network(0))),
        "rounded": SelfDraft(quantize.quantized_copy(tiny_network(0), 4), TINY.mask_id),
    }
    law_S, samples = tiny_law(draw), tiny_samples((DRAFTERS | own)[name], draw, 3)
    assert float(law_S.sum()) == pytest.approx(1)
    assert chi_square_p(samples, law_S, TINY) > 1e-3
    assert chi_square_p(samples, tiny_law(Draw(0.8)), TINY) < 1e-6  # another law would be seen


def with_spare_ids(made: Transformer, spare: int) -> Transformer:
    """The same network with ids that no token has, as checkpoints padded for speed have them, between the tokens and the mask."""
    config, tokens = made.config, made.config.vocab_size - 1
    wider = Transformer(replace(config, vocab_size=config.vocab_size + spare))
    state = dict(made.state_dict())
    for name in ("embed.weight", "head.weight"):
        if name in state:
            extra = torch.randn(spare, config.width, generator=torch.Generator().manual_seed(9))
            state[name] = torch.cat([state[name][:tokens], extra, state[name][tokens:]])
    wider.load_state_dict(state)
    return wider.eval().requires_grad_(False)


@pytest.mark.parametrize(("base", "draft"), [(0, 3), (3, 0), (2, 5)])
@pytest.mark.parametrize("coupling", ["stream", "ratio"])
def test_a_draft_of_other_spare_ids_keeps_the_law(base: int, draft: int, coupling: str) -> None:
    """The target may draw its spare ids, which the draft reads as unknown; those of the draft are never proposed."""
    target, small = with_spare_ids(tiny_network(0), base), with_spare_ids(tiny_network(1), draft)
    size, start = target.config.vocab_size, small.config.vocab_size - 1
    drafter = DraftModel(FittedVocabulary(small, start + 1, size), small.ragged_cache, start)
    sampler = SpeculativeDecoder(target, size - 1, 3, target.ragged_cache, drafter, 2, coupling)
    frames = list(sampler.steps(Canvas.from_rows([[None] * 3] * ROWS, fill=size - 1), rng=generators(0, ROWS)))
    proposed_BT = torch.cat([frame.proposed_BT for frame in frames])  # type: ignore[misc]
    assert set(proposed_BT.unique().tolist()) == {-1, *range(TINY.vocab + min(base, draft))}
    x_S3 = torch.cartesian_prod(*[torch.arange(size - 1)] * 3)
    logp_S3V = target(F.pad(x_S3[:, :2], (1, 0), value=size - 1))[..., : size - 1].log_softmax(-1)
    law_S = logp_S3V.gather(2, x_S3[..., None]).sum((1, 2)).exp()
    index_B = frames[-1].tokens_BT @ torch.tensor([(size - 1) ** 2, size - 1, 1])
    assert chi_square_of_counts(torch.bincount(index_B, minlength=len(law_S)), law_S) > 1e-3


def test_the_same_network_with_spare_ids_proposes_what_holds() -> None:
    small = with_spare_ids(BASE, 3)
    start = small.config.vocab_size - 1
    drafter = DraftModel(FittedVocabulary(small, start + 1, MASK + 1), small.ragged_cache, start)
    *_, frame = decoder(drafter).steps(canvas_of([[1, 2]], 8), rng=generators(3, 1))
    assert_plain(frame, [[1, 2]], 8, 3, Draw())
    assert frame.forwards == 3


@pytest.mark.slow
@pytest.mark.parametrize(("base", "draft"), [(0, 40), (40, 0)])
def test_a_draft_may_be_padded_otherwise(base: int, draft: int, tmp_path: Path) -> None:
    model = load(str(publish(transformer("Llama", spare=base), tmp_path / "base")))
    small = publish(transformer("Llama", spare=draft, seed=1, num_hidden_layers=1), tmp_path / "draft")
    plain_, same = (model.generate("ROMEO:", length=50, seed=2, sampler=word) for word in ("autoregressive", f"draft:{small}"))
    assert same.text == plain_.text
    assert same.proposed


def test_stream_has_it_too() -> None:
    assert chi_square_p(tiny_samples(MaskDrafter(), Draw(), 4, "stream"), tiny_law(Draw()), TINY) > 1e-3


# --- the traps of MATHS.md 7: the wrong variant and ours ---------------------------------------------------------

P, Q = (torch.tensor(x, dtype=torch.float64) for x in ((0.5, 0.3, 0.2), (0.6, 0.3, 0.1)))


def first_token(token_B: Tensor, tested_V: Tensor | None, law_V: Tensor = P, rows: int = 40_000) -> Tensor:
    """Counts of the token that comes of one proposal a row under the law; tested_V: what it is said to be drawn from."""
    rng = torch.Generator().manual_seed(1)
    logp_BKV = law_V.log().expand(rows, 2, -1)
    logq_BKV = None if tested_V is None else tested_V.log().expand(rows, 1, -1)
    test_BK, last_B = torch.rand(rows, 1, generator=rng, dtype=torch.float64), torch.rand(rows, generator=rng, dtype=torch.float64)
    taken_B, other_B = accept_by_ratio(logp_BKV, DraftTokens(token_B[:, None], torch.ones_like(token_B), logq_BKV), test_BK, last_B)
    return torch.bincount(torch.where(taken_B > 0, token_B, other_B), minlength=len(law_V))


def drawn(law_V: Tensor, rows: int = 40_000) -> Tensor:
    u_B1 = torch.rand(rows, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return categorical(law_V.log().expand(rows, 1, -1), u_B1).squeeze(1)


def test_a_certain_draft_is_not_tested_against_the_softmax_it_comes_from() -> None:
    best_B = torch.full((40_000,), int(Q.argmax()))
    wrong = first_token(best_B, Q)
    torch.testing.assert_close(wrong / wrong.sum(), torch.tensor([5 / 6, 0, 1 / 6]), atol=0.01, rtol=0)
    assert chi_square_of_counts(wrong, P) < 1e-6
    assert chi_square_of_counts(first_token(best_B, None), P) > 1e-3
    assert chi_square_of_counts(first_token(drawn(Q), Q), P) > 1e-3


def test_what_replaces_a_rejected_token_is_drawn_from_the_rest() -> None:
    """From p itself, as code does that keeps q(x) alone: rejected .1 of the time, (.5, .3, .1) + .1 p."""
    counts = torch.bincount(drawn(torch.minimum(P, Q) + 0.1 * P), minlength=3)
    assert chi_square_of_counts(counts, P) < 1e-6


def test_truncation_on_one_side_only_is_a_mixture() -> None:
    """Tested with the full law and drawn with the truncated one: a token outside top-k is accepted."""
    draw = Draw(top_k=2)
    cut = draw.shape(P.log()[None])[0].exp()
    assert cut.tolist() == pytest.approx([0.625, 0.375, 0])
    assert chi_square_of_counts(first_token(drawn(Q), Q), cut) < 1e-6
    shaped = draw.shape(Q.log()[None])[0].exp()
    assert chi_square_of_counts(first_token(drawn(shaped), shaped, cut), cut) > 1e-3


class Listener:
    """A network that remembers what it was asked, and the cache as it was then."""

    def __init__(self, made: Transformer) -> None:
        self.network, self.ragged_cache, self.calls = made, made.ragged_cache, list[tuple[Tensor, dict[str, Any]]]()

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **how: Any) -> Tensor:
        self.calls.append((z_BQ, copy.deepcopy(how)))
        logits_BQV: Tensor = self.network(z_BQ, t_B, **how)
        return logits_BQV

    def again(self, call: int, z_BQ: Tensor | None = None) -> Tensor:
        """The call once more, with other tokens."""
        own_BQ, how = self.calls[call]
        how = copy.deepcopy(how) | {"at_BQ": None}
        logits_BQV: Tensor = self.network(own_BQ if z_BQ is None else z_BQ, **how)
        return logits_BQV


@pytest.mark.parametrize(("layout", "groups"), [("tree", [0, 1, 2, 3]), ("restart", [3])])
def test_a_mask_reads_its_prefix_and_the_masks_before_it_in_its_group(layout: str, groups: list[int]) -> None:
    """[last token, 3 proposals, groups of 3 masks]: a change of one input reaches just the outputs that may see it."""
    listener = Listener(BASE)
    list(decoder(MaskDrafter(layout), 4, listener).steps(canvas_of([[1]], 7), rng=generators(0, 1)))
    call = next(i for i, (z_BQ, _) in enumerate(listener.calls) if z_BQ.shape[1] == 4 + 3 * len(groups) and i)
    z_BQ, how = listener.calls[call]
    assert (z_BQ[0, :4] < MASK).all()
    assert (z_BQ[0, 4:] == MASK).all()
    last = int(how["pos_BQ"][0, 0])
    assert how["pos_BQ"][0].tolist() == [*range(last, last + 4), *(last + 1 + after + depth for after in groups for depth in range(3))]
    expected = torch.zeros(z_BQ.shape[1], z_BQ.shape[1], dtype=torch.bool)  # [query, key]
    expected[:4, :4] = torch.ones(4, 4).tril()
    for g, after in enumerate(groups):
        own = slice(4 + 3 * g, 7 + 3 * g)
        expected[own, : after + 1] = True
        expected[own, own] = torch.ones(3, 3).tril()
    before_QV = listener.again(call)[0]
    for key in range(z_BQ.shape[1]):
        other_BQ = z_BQ.clone()
        other_BQ[0, key] = (z_BQ[0, key] + 3) % MASK
        moved_Q = (listener.again(call, other_BQ)[0] - before_QV).abs().amax(-1) > 1e-6
        assert torch.equal(moved_Q, expected[:, key]), key


# --- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tree", "restart", "chain", "lookup", "draft", "rounded", "heads", "tree, 9 nodes", "chain, 14 nodes"])
def test_keys_and_values_are_those_of_the_plain_run(name: str) -> None:
    """Rows at their own lengths; what was rejected, and every mask, has gone."""
    caches: list[RaggedCache] = []
    prompts = [[1, 2, 3], [4], [], [5, 6], [7]]

    def make(rows: int, positions: int) -> RaggedCache:
        caches.append(BASE.ragged_cache(rows, positions))
        return caches[0]

    sampler = replace(decoder(DRAFTERS[name], 4, context=0), make_cache=make)
    checked = 0
    for frame in sampler.steps(canvas_of(prompts, 8), rng=generators(5, len(prompts))):
        for row in range(len(prompts)):
            held = int(caches[0].length_B[row])
            if not held:
                continue
            cache = BASE.cache(1)
            BASE(torch.cat([torch.full((1, 1), MASK), frame.tokens_BT[row : row + 1]], 1)[:, :held], cache=cache)
            torch.testing.assert_close(caches[0].kv[:, :, row, :, :held], cache.kv[:, :, 0, :, :held], atol=1e-5, rtol=1e-4)
            checked += held
    assert checked > 60
    assert len(caches) == 1


@pytest.mark.parametrize("layout", ["tree", "restart"])
@pytest.mark.parametrize("start", [0, -1])
def test_an_adapter_at_masks_leaves_the_text_alone(layout: str, start: int) -> None:
    """Gated LoRA with wild weights: the text is that of the base without it, its proposals are not."""
    made, rng = network(), torch.Generator().manual_seed(4)
    base = decoder(MaskDrafter(layout), made=made, start=start, context=0)
    canvas = canvas_of([[1, 2, 3], []], 9)
    before = list(base.rounds(canvas, rng=generators(1, 2)))
    lora.attach(made, lora.AdapterConfig(rank=2), MASK)
    for name, tensor in lora.adapter_state(made).items():
        tensor.normal_(0.0, 1.0 if "mask_row" in name else 0.3, generator=rng)
    after = list(base.rounds(canvas, rng=generators(1, 2)))
    assert torch.equal(before[-1][0].tokens_BT, after[-1][0].tokens_BT)
    assert [t.accepted_B.tolist() for _, t in before] != [t.accepted_B.tolist() for _, t in after]


def proposed_after_calls(name: str) -> Iterator[tuple[Tensor, list[int]]]:
    """(committed text, the proposals after it) of every row and call of a greedy run."""
    canvas = canvas_of([[1, 2, 3], [4]], 8)
    for frame, tally in decoder(DRAFTERS[name], draw=Draw(0.0), context=0).rounds(canvas, rng=generators(5, 2)):
        for row in range(2):
            known = int(frame.settled_BT[row].sum()) - int((~canvas.valid_BT[row]).sum())
            proposed = [i for i in frame.proposed_BT[row].tolist() if i >= 0]  # type: ignore[index]
            if tally.committed_B[row] and proposed:
                yield frame.tokens_BT[row, :known], proposed


def test_heads_guess_from_the_state_that_the_last_token_was_drawn_from() -> None:
    """What is proposed after every call is what the heads say of the plain run of the text, up to where its last token was drawn."""
    checked = 0
    for text_L, proposed in proposed_after_calls("heads"):
        read_BT = F.pad(text_L[None, :-1], (1, 0), value=MASK)  # all but the last token
        logits_KV = DRAFTERS["heads"].logits(BASE(read_BT, logits=False)[:, -1], 3)[0, :, :MASK]
        assert proposed == logits_KV.argmax(-1).tolist()[: len(proposed)]
        checked += len(proposed)
    assert checked > 10


@pytest.mark.parametrize("name", ["chain", "chain, 14 nodes"])
def test_a_chain_guesses_from_its_mask_and_the_tokens_before(name: str) -> None:
    """What is proposed after every call is what the chain says of masks that stand after the committed text, one after another."""
    drafter, checked = DRAFTERS["chain"], 0
    for text_L, proposed in proposed_after_calls(name):
        read_BT = F.pad(text_L[None, :-1], (1, 3), value=MASK)
        states_BMD, before_BS = BASE(read_BT, logits=False)[:, len(text_L) :], text_L[None, -1:]
        for slot, token in enumerate(proposed):
            assert token == int(drafter.chain(slot, states_BMD[:, slot], before_BS)[0, :MASK].argmax())
            before_BS = torch.cat([before_BS, torch.tensor([[token]])], 1)
            checked += 1
    assert checked > 10


def test_rows_of_a_cache_grow_at_their_own_pace() -> None:
    """Read in ragged pieces, with padding behind and a trim between, as the whole at once."""
    tokens_BT = torch.randint(MASK, (3, 10), generator=torch.Generator().manual_seed(0))
    whole_BTV, cache, done = BASE(tokens_BT), BASE.ragged_cache(3, 16), torch.zeros(3, dtype=torch.long)
    for counts in ([1, 4, 2], [3, 0, 5], [2, 2, 2], [4, 4, 1]):
        count_B = torch.tensor(counts)
        wide = int(count_B.max()) + 1  # one position of rubbish at least
        index_BQ = done[:, None] + torch.arange(wide)
        real_BQ = torch.arange(wide) < count_B[:, None]
        z_BQ = torch.where(real_BQ, tokens_BT.gather(1, index_BQ.clamp(max=9)), MASK)
        own_BQQ = torch.ones(wide, wide, dtype=torch.bool).tril().expand(3, -1, -1)
        logits_BQV = BASE(z_BQ, pos_BQ=index_BQ, own_BQQ=own_BQQ, cache=cache)
        row, q = real_BQ.nonzero(as_tuple=True)
        torch.testing.assert_close(logits_BQV[row, q], whole_BTV[row, index_BQ[row, q]], atol=2e-5, rtol=1e-4)
        done = done + count_B
        cache.trim(done)
        assert torch.equal(cache.length_B, done)
    assert done.tolist() == [10, 10, 10]
    assert cache.capacity == 16


def test_a_cache_says_what_it_cannot_do() -> None:
    cache = BASE.ragged_cache(2, 4)
    with pytest.raises(ValueError, match="holds 4 positions, 5"):
        cache.begin(torch.ones(2, 5, 5, dtype=torch.bool))
    for length in ([1, 0], [0, -1]):
        with pytest.raises(ValueError, match="trim"):
            cache.trim(torch.tensor(length))


# --- how many tokens a call --------------------------------------------------------------------------------------


class Acceptance:
    """Knows the text by position and says so greedily; a mask is right with a given chance, each for itself."""

    def __init__(self, chance: float) -> None:
        self.chance, self.rng = chance, torch.Generator().manual_seed(0)

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, *, pos_BQ: Tensor, cache: RaggedCache, **_: object) -> Tensor:
        cache.advance(z_BQ.shape[1])
        wrong_BQ = (z_BQ == MASK) & (pos_BQ > 0) & (torch.rand(z_BQ.shape, generator=self.rng) >= self.chance)
        return torch.nn.functional.one_hot((5 * pos_BQ + wrong_BQ) % MASK, MASK + 1).float() * 10

    def ragged_cache(self, rows: int, positions: int) -> RaggedCache:
        return RaggedCache(1, rows, 1, positions, 2, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(("chance", "stride"), [(0.9, 4), (0.7, 3), (0.5, 5), (0.8, 2)])
@pytest.mark.parametrize("layout", ["restart", "tree"])
def test_tokens_per_forward_are_those_of_the_formula(layout: str, chance: float, stride: int) -> None:
    known, rows, length = Acceptance(chance), 40, 400
    sampler = SpeculativeDecoder(known, MASK, length, known.ragged_cache, MaskDrafter(layout), stride, draw=Draw(0.0))
    committed = calls = 0
    for _, tally in sampler.rounds(canvas_of([[]] * rows, length), rng=generators(0, rows)):
        committed, calls = committed + int(tally.committed_B.sum()), calls + int((tally.committed_B > 0).sum())
    assert committed == rows * length
    a, n = chance, stride
    formula = (2 + sum(a**k for k in range(1, n - 1))) / (2 - a ** (n - 1)) if layout == "restart" else (1 - a**n) / (1 - a)
    assert tokens_per_forward([a] * (n - 1), restart=layout == "restart") == pytest.approx(formula)
    assert committed / calls == pytest.approx(formula, rel=0.03)


def test_no_restart_is_worth_half_a_token() -> None:
    assert tokens_per_forward([0.9] * 3, restart=False) == pytest.approx(3.44, abs=0.005)
    assert tokens_per_forward([0.9] * 3) == pytest.approx(2.92, abs=0.005)
    assert tokens_per_forward([]) == tokens_per_forward([], restart=False) == 1


@pytest.mark.parametrize(("layout", "nodes", "most"), [("restart", 3, 7), ("tree", 3, 16), ("tree", 8, 36), ("tree", 16, 68)])
def test_positions_of_a_call(layout: str, nodes: int, most: int) -> None:
    known, tree = Acceptance(1.0), Tree.likeliest(nodes, 3)
    sampler = SpeculativeDecoder(known, MASK, 50, known.ragged_cache, MaskDrafter(layout), 4, tree=tree, draw=Draw(0.0))
    tallies = [tally for _, tally in sampler.rounds(canvas_of([[]], 50), rng=generators(0, 1))]
    assert [t.positions for t in tallies[:3]] == [4, most, most]
    assert [int(t.committed_B) for t in tallies] == [1, *[4] * 12, 1]


def test_the_layout_follows_the_cost() -> None:
    def chosen(fixed: float, each: float, chance: float) -> str:
        return MaskDrafter.cheapest(lambda sizes: [fixed + each * positions for positions in sizes], 4, chance).layout

    assert chosen(1.0, 0.0, 0.8) == "tree"
    assert chosen(0.0, 1.0, 0.8) == "restart"
    # where little is refused a tree gains less than a tenth, which it costs
    assert chosen(40.0, 0.5, 0.4) == "tree"
    assert chosen(40.0, 0.5, 0.99) == "restart"


def test_an_unsure_network_proposes_less() -> None:
    """c^k >= floor: the more is asked for, the fewer are proposed, and the text stays."""
    proposed = []
    for floor in (0.0, 0.05, 0.15, 1.0):
        rounds = list(decoder(DRAFTERS["itself"], floor=floor).rounds(canvas_of([[1, 2], [3]], 30), rng=generators(7, 2)))
        assert_plain(rounds[-1][0], [[1, 2], [3]], 30, 7, Draw())
        proposed.append(sum(int(tally.drafted_B.sum()) for _, tally in rounds) / len(rounds))
    assert proposed == sorted(proposed, reverse=True)
    assert proposed[0] > proposed[2] > proposed[3] == 0


# --- as many as pay ----------------------------------------------------------------------------------------------


class Wandering(AdaptiveDraftLength):
    """Another stride for every call."""

    def choose(self, rows: int) -> int:
        self._since += 1
        return self.strides[self._since * 7 % 11 % len(self.strides)]


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_stride_may_change_with_every_call(name: str, draw: Draw) -> None:
    pace = Wandering(5)
    frames = list(decoder(DRAFTERS[name], 5, draw=draw, draft_length=pace).steps(canvas_of(PROMPTS, 25), rng=generators(3, len(PROMPTS))))
    assert_plain(frames[-1], PROMPTS, 25, 3, draw)
    assert pace._since == len(frames)
    assert pace._seconds


def test_the_greatest_stride_is_the_adapters(autoregressive_dir: Path) -> None:
    model = load(str(autoregressive_dir))
    assert cast(SpeculativeDecoder, model.sampler(sampler="strided:auto")).stride == 4
    assert cast(SpeculativeDecoder, model.sampler(sampler="lookup:auto")).stride == 8
    lora.attach(model.network, lora.AdapterConfig(2, 4.0, stride=3), model.tokenizer.mask_id)
    one, two = (cast(SpeculativeDecoder, model.sampler(sampler="strided:auto")) for _ in range(2))
    assert one.stride == 3
    assert one.draft_length is two.draft_length


# --- prompt lookup -----------------------------------------------------------------------------------------------


def looked_up(text: list[int], ngram: int = 3, most: int = 3) -> list[int]:
    committed = CommittedText.of(canvas_of([text], 5), len(text) + 5, 0, MASK)
    request = Request(torch.tensor([most]), torch.rand(1, 3), Tree.chain(3), TokenDraw(Draw(), MASK))
    last = LastPass(torch.zeros(1, 0, 0), torch.tensor([False]), None, cast(Any, None), 0)
    found = PromptLookup(ngram)(DraftContext(committed, request, last))
    assert found.logq_BKV is None
    return found.token_BK[0, : int(found.count_B)].tolist()


def test_lookup_finds_what_came_next() -> None:
    assert looked_up([1, 2, 3, 4, 5, 6, 1, 2, 3]) == [4, 5, 6]
    assert looked_up([1, 2, 3, 4, 5, 6, 1, 2, 3], most=2) == [4, 5]
    assert looked_up([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2]) == [5, 8, 1]  # the longest, 7 1 2, before the latest
    assert looked_up([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], ngram=2) == [6, 7, 1]
    assert looked_up([1, 2, 1, 2]) == [1, 2, 1]  # goes on round where it reaches the end
    assert looked_up([3, 3]) == [3, 3, 3]
    assert looked_up([1, 2, 3]) == looked_up([5]) == looked_up([]) == []


def test_lookup_is_quick_in_a_text_that_repeats_itself() -> None:
    class Cycle(Acceptance):
        def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, *, cache: RaggedCache, **_: object) -> Tensor:
            cache.advance(z_BQ.shape[1])
            return torch.nn.functional.one_hot((z_BQ + 1) % 5, MASK + 1).float() * 10

    known = Cycle(1.0)
    sampler = SpeculativeDecoder(known, MASK, 64, known.ragged_cache, PromptLookup(), 4, draw=Draw(0.0))
    *_, frame = sampler.steps(canvas_of([[0]], 60), rng=generators(0, 1))
    assert frame.tokens_BT[0].tolist() == [i % 5 for i in range(61)]
    assert frame.forwards <= 6 + 54 / 4 + 1


# --- bad input, and the words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"stride": 0},
        {"floor": -0.1},
        {"floor": float("nan")},
        {"floor": 1.1},
        {"coupling": "loose"},
        {"context": WINDOW},
        {"draft_length": AdaptiveDraftLength(3)},
        {"draft_length": AdaptiveDraftLength(4), "coupling": "ratio"},
        {"tree": Tree.likeliest(6, 3), "coupling": "ratio"},
        {"tree": Tree.likeliest(6, 3), "draft_length": AdaptiveDraftLength(4)},
        {"tree": Tree.likeliest(6, 2)},
    ],
)
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        decoder(MaskDrafter(), **bad)


@pytest.mark.parametrize("make", [lambda: MaskDrafter("bush"), lambda: PromptLookup(0)])
def test_bad_proposers(make: Callable[[], Any]) -> None:
    with pytest.raises(InputError):
        make()


def test_what_it_cannot_continue() -> None:
    with pytest.raises(InputError, match="cannot fill holes"):
        next(decoder(MaskDrafter()).steps(Canvas.from_rows([[1, None, 2]], fill=MASK), rng=generators(0, 1)))
    with pytest.raises(InputError, match="at least one token"):
        next(decoder(MaskDrafter(), start=None).steps(canvas_of([[]], 3), rng=generators(0, 1)))
    with pytest.raises(InputError, match="needs context"):
        decoder(MaskDrafter(), start=None, context=0)
    assert list(decoder(MaskDrafter()).steps(Canvas.from_rows([[1, 2]], fill=MASK), rng=generators(0, 1))) == []


WORDS = [
    "strided",
    "strided:2",
    "strided:auto",
    "strided:4x9",
    "lookup:auto",
    "draft:{},auto",
    "lookup",
    "lookup:8,0.3",
    "draft:{}",
    "draft:{},3",
    "draft:{},8,0.1",
    "draft:int4,8",
    "draft:int8,auto",
]


@pytest.mark.parametrize("word", WORDS)
def test_words_of_a_language_model(word: str, autoregressive_dir: Path) -> None:
    model, word = dlm.load(str(autoregressive_dir)), word.format(autoregressive_dir)
    for options in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}):
        base, same = (model.generate(["ROMEO:", "But", "A"], length=45, seed=5, sampler=sampler, **options) for sampler in (None, word))
        assert [row.text for row in same] == [row.text for row in base]
        assert same[0].sampler == word
        assert same[0].forwards <= base[0].forwards


@pytest.mark.slow
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_the_command_writes_the_same_bytes(dlm: Dlm, temperature: str) -> None:
    words = ("generate", "ROMEO:", "--model", "shakespeare-ar", "--max-new-tokens", "30", "--temperature", temperature, "--seed", "2")
    code, base, _ = dlm(*words)
    assert code == 0
    assert len(base) > 30
    for sampler in ("lookup:4", "draft:shakespeare-ar", "strided:3", "lookup:auto"):
        assert dlm(*words, "--sampler", sampler)[:2] == (0, base), sampler


def test_lossless_takes_the_best_that_there_is(dlm: Dlm, autoregressive_dir: Path, masked_dir: Path, tmp_path: Path) -> None:
    model = load(str(autoregressive_dir))
    config = lora.AdapterConfig(rank=2, stride=3, base="x", fingerprint=lora.fingerprint(model.network))
    lora.attach(model.network, config, model.tokenizer.mask_id)
    lora.save_adapter(tmp_path / "adapter", model.network, config)
    words = ("generate", "ROMEO:", "--model", str(autoregressive_dir), "--max-new-tokens", "40")
    code, base, _ = dlm(*words)
    assert code == 0
    for options, chosen in (((), "lookup:auto"), (("--adapter", str(tmp_path / "adapter")), "strided:auto")):
        code, out, err = dlm(*words, *options, "--lossless", "--watch", "--save", "run.traj")
        assert (code, out) == (0, base), err
        run = Trajectory.load("run.traj")
        assert f"{chosen}, seed 0: 40 tokens in {run.forwards[-1]} forward passes, {40 / run.forwards[-1]:.1f} a pass" in err
        accepted, proposed = int(run.accepted_B), int(run.proposed_B)
        share = f"{accepted / proposed:.0%} of " if proposed else ""  # on a busy machine plain decoding may be all that pays
        assert f"{share}{proposed} draft tokens accepted" in err
        record = json.loads(dlm(*words, *options, "--lossless", "--json")[1])
        assert record["sampler"] == chosen
        assert record["forwards"] == 40 - record["accepted"]
        assert dlm("show", "run.traj")[:2] == (0, base)
    assert "is for autoregressive" in dlm.told("generate", "--model", str(masked_dir), "--lossless")
    assert "leave --sampler" in dlm.told(*words, "--lossless", "--sampler", "lookup")


@pytest.mark.slow
def test_bad_words_are_told(dlm: Dlm, autoregressive_dir: Path, masked_dir: Path, tmp_path: Path) -> None:
    make_model("autoregressive", alphabet="zyx").save_pretrained(tmp_path / "other")
    words = ("generate", "--model", str(autoregressive_dir), "--sampler")
    for bad in ("strided:4x2", "strided:4x65", "strided:autox8"):
        assert "STRIDExCANDIDATES has stride - 1" in dlm.told(*words, bad), bad
    for bad in (
        "lookup:4x8",
        "strided:4x",
        "lookup:0",
        "lookup:x",
        "strided:4,x",
        "strided:4,0.1,1",
        "strided:Auto",
        "draft",
        "draft:",
        "draft:a,b",
    ):
        assert "stride, floor" in dlm.told(*words, bad), bad
    assert "floor lies in" in dlm.told(*words, "lookup:4,2")
    assert "must be autoregressive" in dlm.told(*words, f"draft:{masked_dir}")
    assert "another vocabulary" in dlm.told(*words, f"draft:{tmp_path / 'other'}")
    assert "against a cache" in dlm.told(*words, "lookup", "--cache", "none")
    assert "needs a diffusion model; it can use: autoregressive, strided, lookup, draft" in dlm.told(*words, "topk")
    assert "needs a diffusion model" in dlm.told(*words, "lookup", "--block-length", "4")
    assert "needs an autoregressive model" in dlm.told("generate", "--model", str(masked_dir), "--sampler", "lookup")
