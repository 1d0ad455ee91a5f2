"""Guidance: its formulas on random logits, and what it draws against the enumerated p(x | y) of a tiny distribution.

Shapes: B rows, T positions, V vocabulary with the mask, S = V^T sequences.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.sampling.diffusion.guidance import Classifier, ClassifierFree
from dlm.sampling.diffusion.protocols import Guidance
from dlm.sampling.draw import categorical
from oracle import BayesDenoiser, Noted, Tiny, chi_square_p

V, MASK, T = 6, 5, 7
ROWS = 3000
TINY = Tiny(3, 3, seed=0)
LABEL_S = torch.rand(len(TINY.p_S), generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 2  # p(y | x)


def some(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """z_BT with masks, t_B, given_BT; the last row has no prompt."""
    rng = torch.Generator().manual_seed(0)
    z_BT = torch.randint(0, V - 1, (rows, T), generator=rng)
    rank_BT = torch.rand(rows, T, generator=rng).argsort(-1)
    given_BT = (rank_BT == 3) | (rank_BT == 4)  # 0 - 2 are masks, 5 and 6 were written before
    given_BT[-1] = False
    return z_BT.masked_fill(rank_BT < 3, MASK), torch.rand(rows, generator=rng), given_BT


def bare(logits_BTV: Tensor) -> Tensor:
    return logits_BTV.masked_fill(torch.arange(V) == MASK, -torch.inf).log_softmax(-1)


def test_no_prompt_guidance_is_the_conditional_and_none_the_unconditional() -> None:
    z_BT, t_B, given_BT = some()
    without_BT = torch.where(given_BT, MASK, z_BT)
    cond_BTV, uncond_BTV = Noted(V - 1, T)(z_BT, t_B), Noted(V - 1, T)(without_BT, t_B)
    assert not torch.equal(cond_BTV[:-1], uncond_BTV[:-1])
    for scale, expected_BTV, seen_BT in ((1.0, cond_BTV, z_BT), (0.0, uncond_BTV, without_BT)):
        read = Noted(V - 1, T)
        assert torch.equal(ClassifierFree(scale, MASK)(read, z_BT, t_B, given_BT), expected_BTV)
        assert len(read.seen) == 1
        assert torch.equal(read.seen[0][0], seen_BT)
        assert torch.equal(read.seen[0][1], t_B)


@pytest.mark.parametrize("scale", [0.3, 1.5, 4.0])
def test_classifier_free_guidance_is_its_formula(scale: float) -> None:
    """p_cond^scale p_uncond^(1 - scale), normalised, in one call; a row without a prompt is left as it is."""
    z_BT, t_B, given_BT = some()
    read = Noted(V - 1, T)
    got_BTV = ClassifierFree(scale, MASK)(read, z_BT, t_B, given_BT)
    assert len(read.seen) == 1
    assert read.seen[0][0].shape == (2 * len(z_BT), T)
    assert torch.equal(read.seen[0][1], torch.cat([t_B, t_B]))
    cond_BTV = bare(Noted(V - 1, T)(z_BT, t_B))
    uncond_BTV = bare(Noted(V - 1, T)(torch.where(given_BT, MASK, z_BT), t_B))
    weight_BTV = cond_BTV.exp() ** scale * uncond_BTV.exp() ** (1 - scale)
    weight_BTV[..., MASK] = 0
    probs_BTV = weight_BTV / weight_BTV.sum(-1, keepdim=True)
    assert torch.allclose(bare(got_BTV)[:-1].exp(), probs_BTV[:-1], atol=1e-6)
    assert torch.equal(got_BTV[-1], Noted(V - 1, T)(z_BT, t_B)[-1])
    assert (got_BTV[:-1, :, MASK] == -torch.inf).all()
    assert not got_BTV.isnan().any()
    assert not torch.allclose(probs_BTV[:-1], cond_BTV[:-1].exp(), atol=1e-2)


def test_a_token_that_the_network_excludes_stays_excluded() -> None:
    z_BT, t_B, given_BT = some()
    table_BTV = torch.randn(2 * len(z_BT), T, V, generator=torch.Generator().manual_seed(3))
    table_BTV[:, :, 0], table_BTV[len(z_BT) :, :, 1], table_BTV[: len(z_BT), :, 2] = -torch.inf, -torch.inf, -torch.inf
    for scale in (0.5, 2.0):
        got_BTV = ClassifierFree(scale, MASK)(lambda z_BT, t_B: table_BTV[: len(z_BT)], z_BT, t_B, given_BT)[:-1]
        assert (got_BTV[..., [0, 1, 2, MASK]] == -torch.inf).all()
        assert got_BTV[..., [3, 4]].isfinite().all()


def test_without_any_prompt_there_is_one_undoubled_call() -> None:
    z_BT, t_B, given_BT = some()
    read = Noted(V - 1, T)
    got_BTV = ClassifierFree(3.0, MASK)(read, z_BT, t_B, torch.zeros_like(given_BT))
    assert len(read.seen) == 1
    assert torch.equal(got_BTV, Noted(V - 1, T)(z_BT, t_B))


def label(hot_BTV: Tensor) -> Tensor:
    """log p(y | z) of TINY, marginalised over what the masks may hide; differentiable."""
    fits_BST = hot_BTV[:, :, TINY.x_ST].diagonal(dim1=1, dim2=3) + hot_BTV[..., TINY.mask_id][:, None]
    weight_BS = fits_BST.prod(-1) * TINY.p_S
    return ((weight_BS @ LABEL_S) / weight_BS.sum(-1)).log()


def decode(guidance: Guidance | None, rows: int = ROWS) -> Tensor:
    """int64 (rows, T): one position of each row a call, in random order."""
    rng, read = torch.Generator().manual_seed(0), BayesDenoiser(TINY)
    z_BT = torch.full((rows, TINY.length), TINY.mask_id)
    order_BT = torch.rand(rows, TINY.length, generator=rng).argsort(-1)
    given_BT = torch.zeros_like(z_BT, dtype=torch.bool)
    for at_B in order_BT.unbind(1):
        t_B = torch.ones(rows, dtype=torch.float64)
        with torch.no_grad():
            logits_BTV = guidance(read, z_BT, t_B, given_BT) if guidance else read(z_BT, t_B)
        logits_BTV[..., TINY.mask_id] = -torch.inf
        one_B1V = logits_BTV[torch.arange(rows), at_B][:, None]
        u_B1 = torch.rand(rows, 1, generator=rng, dtype=torch.float64)
        z_BT[torch.arange(rows), at_B] = categorical(one_B1V, u_B1)[:, 0]
    return z_BT


def test_the_exact_classifier_draws_the_conditional() -> None:
    """One token a call with Bayes' denoiser and Bayes' classifier: p(x | y) itself, and neither p(x) nor the first order."""
    weight_S = TINY.p_S * LABEL_S
    conditional_S = weight_S / weight_S.sum()
    assert chi_square_p(decode(Classifier(label, 1.0, TINY.mask_id, exact=True)), conditional_S, TINY) > 1e-3
    assert chi_square_p(decode(None), conditional_S, TINY) < 1e-6
    assert chi_square_p(decode(None), TINY.p_S, TINY) > 1e-3
    assert chi_square_p(decode(Classifier(label, 2.0, TINY.mask_id, exact=True)), conditional_S, TINY) < 1e-6
    assert chi_square_p(decode(Classifier(label, 1.0, TINY.mask_id)), conditional_S, TINY) < 1e-6


WEIGHT_TV = torch.randn(T, V, generator=torch.Generator().manual_seed(2))


def linear(hot_BTV: Tensor) -> Tensor:
    return (hot_BTV * WEIGHT_TV).sum((-1, -2)) - 9


@pytest.mark.parametrize("exact", [False, True])
def test_a_linear_classifier_adds_its_weights(exact: bool) -> None:
    """log p(x_i | z) + scale (w_v - w_mask) at the masks, whichever way; elsewhere the network's own logits."""
    z_BT, t_B, given_BT = some(80)
    read = Noted(V - 1, T)
    with torch.no_grad():
        got_BTV = Classifier(linear, 2.5, MASK, exact)(read, z_BT, t_B, given_BT)
    assert len(read.seen) == 1
    assert not got_BTV.requires_grad
    logits_BTV = Noted(V - 1, T)(z_BT, t_B)
    expected_BTV = bare(logits_BTV) + 2.5 * (WEIGHT_TV - WEIGHT_TV[:, MASK:])
    masked_BT = z_BT == MASK
    assert int(masked_BT.sum()) * (V - 1) > 1024  # more than one chunk
    assert torch.allclose(bare(got_BTV)[masked_BT], bare(expected_BTV)[masked_BT], atol=1e-4)
    assert torch.equal(got_BTV[~masked_BT], logits_BTV[~masked_BT])
    assert (got_BTV[masked_BT][:, MASK] == -torch.inf).all()
    assert not got_BTV.isnan().any()
    assert torch.equal(Classifier(linear, 0.0, MASK, exact)(Noted(V - 1, T), z_BT, t_B, given_BT), logits_BTV)


def test_the_exact_classifier_is_shown_every_replacement_once() -> None:
    seen: list[Tensor] = []

    def note(hot_NTV: Tensor) -> Tensor:
        assert (hot_NTV.sum(-1) == 1).all()
        seen.append(hot_NTV.argmax(-1))
        return hot_NTV.new_zeros(len(hot_NTV))

    z_1T = torch.tensor([[0, MASK, 2, MASK, 4, 4, 4]])
    Classifier(note, 1.0, MASK, exact=True)(Noted(V - 1, T), z_1T, torch.ones(1), z_1T != MASK)
    shown = {tuple(row) for part in seen for row in part.tolist()}
    one = [(0, v, 2, MASK, 4, 4, 4) for v in range(V - 1)] + [(0, MASK, 2, v, 4, 4, 4) for v in range(V - 1)]
    assert shown == set(one)
    assert sum(map(len, seen)) == len(one)


def test_nothing_is_tried_where_nothing_is_masked_or_the_network_says_no() -> None:
    seen: list[Tensor] = []

    def note(hot_NTV: Tensor) -> Tensor:
        seen.append(hot_NTV)
        return hot_NTV.new_zeros(len(hot_NTV))

    only_one_BTV = torch.where(torch.arange(V) == 1, 0.0, -torch.inf).expand(1, T, V)
    for z_1T, count in ((torch.ones(1, T, dtype=torch.long), 0), (torch.full((1, T), MASK), T)):
        seen.clear()
        Classifier(note, 1.0, MASK, exact=True)(lambda z_BT, t_B: only_one_BTV, z_1T, torch.ones(1), z_1T != MASK)
        assert sum(map(len, seen)) == count
        assert len(seen) == (count > 0)


def test_a_token_without_a_chance_is_never_bent_to_nan() -> None:
    def no_zero(hot_NTV: Tensor) -> Tensor:
        return torch.where(hot_NTV[..., 0].sum(-1) > 0, -torch.inf, 0.0)

    z_BT, t_B, given_BT = torch.full((2, T), MASK), torch.ones(2), torch.zeros(2, T, dtype=torch.bool)
    got_BTV = Classifier(no_zero, 3.0, MASK, exact=True)(Noted(V - 1, T), z_BT, t_B, given_BT)
    assert (got_BTV[..., [0, MASK]] == -torch.inf).all()
    assert got_BTV[..., 1:MASK].isfinite().all()
    with pytest.raises(InputError, match="excludes every token"):
        Classifier(lambda hot: torch.full((len(hot),), -torch.inf), 1.0, MASK, exact=True)(Noted(V - 1, T), z_BT, t_B, given_BT)


def test_what_cannot_guide_is_told() -> None:
    z_BT, t_B, given_BT = some()
    for scale in (-0.1, math.inf, math.nan):
        for make in (lambda s: ClassifierFree(s, MASK), lambda s: Classifier(linear, s, MASK)):
            with pytest.raises(InputError, match="guidance scale must be at least 0 and at most"):
                make(scale)
    with pytest.raises(InputError, match="no gradient: use exact=True"):
        Classifier(lambda hot: linear(hot.round().detach()), 1.0, MASK)(Noted(V - 1, T), z_BT, t_B, given_BT)
    for exact in (False, True):
        with pytest.raises(InputError, match="one log-probability a row"):
            Classifier(lambda hot: hot.sum(-1), 1.0, MASK, exact)(Noted(V - 1, T), z_BT, t_B, given_BT)
