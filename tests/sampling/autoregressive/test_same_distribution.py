"""Rejection sampling of draft tokens keeps the distribution of the plain sampler, enumerated; the wrong variants do not.

Shapes: B rows, L columns, K draft tokens, Q positions of one forward pass, V vocabulary, S = V^T sequences.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bases import publish, transformer
from dlm.inference import quantize
from dlm.language_model import load
from dlm.sampling.autoregressive.draft_tokens import DraftTokens
from dlm.sampling.autoregressive.drafters import (
    DraftModel,
    FittedVocabulary,
    MaskDrafter,
    SelfDraft,
)
from dlm.sampling.autoregressive.protocols import DraftContext
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.autoregressive.verification import accept_by_ratio
from dlm.sampling.draw import Draw, categorical, generators
from dlm.trajectory import Canvas
from oracle import chi_square_of_counts, chi_square_p
from sampling.autoregressive.decoders import (
    BASE,
    DRAFTERS,
    MASK,
    ROWS,
    TINY,
    assert_plain,
    canvas_of,
    chained,
    decoder,
    guessing,
    tiny_law,
    tiny_network,
    tiny_samples,
    with_spare_ids,
)


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


@pytest.mark.parametrize(("base", "draft"), [(0, 3), (3, 0), (2, 5)])
@pytest.mark.parametrize("coupling", ["stream", "ratio"])
def test_a_draft_of_other_spare_ids_keeps_the_law(base: int, draft: int, coupling: str) -> None:
    """The target may draw its spare ids, which the draft reads as unknown; those of the draft are never proposed."""
    target, small = with_spare_ids(tiny_network(0), base), with_spare_ids(tiny_network(1), draft)
    size, start = target.config.vocab_size, small.config.vocab_size - 1
    drafter = DraftModel(FittedVocabulary(small, start + 1, size), small.ragged_cache, start)
    sampler = SpeculativeDecoder(target, size - 1, 3, target.ragged_cache, drafter, 2, coupling)
    frames = list(sampler.steps(Canvas.from_rows([[None] * 3] * ROWS, fill=size - 1), rng=generators(0, ROWS)))
    draft_BT = torch.cat([frame.draft_BT for frame in frames])  # type: ignore[misc]
    assert set(draft_BT.unique().tolist()) == {-1, *range(TINY.vocab + min(base, draft))}
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
