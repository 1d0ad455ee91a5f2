"""Draft tokens are those of heads, masks and the text so far.

Shapes: B rows, L columns, K draft tokens, Q positions of one forward pass, V vocabulary, S = V^T sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.errors import InputError
from dlm.sampling.autoregressive.committed_text import CommittedText
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.drafters import (
    MaskDrafter,
    PromptLookup,
)
from dlm.sampling.autoregressive.protocols import DraftContext, LastPass, Request
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.autoregressive.token_draw import TokenDraw
from dlm.sampling.draw import Draw, generators
from sampling.autoregressive.decoders import (
    BASE,
    DRAFTERS,
    MASK,
    Acceptance,
    canvas_of,
    decoder,
)


def proposed_after_calls(name: str) -> Iterator[tuple[Tensor, list[int]]]:
    """(committed text, the proposals after it) of every row and call of a greedy run."""
    canvas = canvas_of([[1, 2, 3], [4]], 8)
    for frame, tally in decoder(DRAFTERS[name], draw=Draw(0.0), context=0).rounds(canvas, rng=generators(5, 2)):
        for row in range(2):
            known = int(frame.settled_BT[row].sum()) - int((~canvas.valid_BT[row]).sum())
            assert frame.draft_BT is not None
            proposed = [i for i in frame.draft_BT[row].tolist() if i >= 0]
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
        def __call__(
            self, z_BQ: Tensor, t_B: Tensor | None = None, *, pos_BQ: Tensor | None = None, cache: Any = None, **_: object
        ) -> Tensor:
            cache.advance(z_BQ.shape[1])
            return torch.nn.functional.one_hot((z_BQ + 1) % 5, MASK + 1).float() * 10

    known = Cycle(1.0)
    sampler = SpeculativeDecoder(known, MASK, 64, known.ragged_cache, PromptLookup(), 4, draw=Draw(0.0))
    *_, frame = sampler.steps(canvas_of([[0]], 60), rng=generators(0, 1))
    assert frame.tokens_BT[0].tolist() == [i % 5 for i in range(61)]
    assert frame.forwards <= 6 + 54 / 4 + 1


@pytest.mark.parametrize("make", [lambda: MaskDrafter("bush"), lambda: PromptLookup(0)])
def test_bad_proposers(make: Callable[[], Any]) -> None:
    with pytest.raises(InputError):
        make()
