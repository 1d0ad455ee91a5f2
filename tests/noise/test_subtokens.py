"""Tokens of two sub-tokens that are masked one by one: the sum of marginals is a bound, the joint cross-entropy of a token is none."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from oracle import Tiny

TINY = Tiny(vocab=2, length=4, seed=0)  # two tokens of two bits each


def any_order(joint: bool) -> float:
    """Nats of a row with the exact posterior, over all sets of masked bits; joint: a token with a masked bit costs -log p(it), once."""
    total = 0.0
    for masked in itertools.product([False, True], repeat=4):
        if not any(masked):
            continue
        seen = [i for i in range(4) if not masked[i]]
        same_SS = (TINY.x_ST[:, None, seen] == TINY.x_ST[None, :, seen]).all(-1)
        given_SS = same_SS * TINY.p_S / (same_SS * TINY.p_S).sum(-1, keepdim=True)  # p(row' | visible bits of row)

        def nats(places: list[int], given_SS: Tensor = given_SS) -> Tensor:
            equal_SS = (TINY.x_ST[:, None, places] == TINY.x_ST[None, :, places]).all(-1)
            return -(given_SS * equal_SS).sum(-1).log()

        bits = [i for i in range(4) if masked[i]]
        groups = [[2 * j, 2 * j + 1] for j in range(2) if masked[2 * j] or masked[2 * j + 1]] if joint else [[i] for i in bits]
        cost_S = torch.stack([nats(group) for group in groups]).sum(0)
        sets = len(list(itertools.combinations(range(4), len(bits))))
        total += float((TINY.p_S * cost_S).sum()) / len(bits) / sets  # k uniform on 1..n, n / k of its mean
    return total


def test_marginals_give_the_entropy_and_the_joint_falls_below_it() -> None:
    assert abs(any_order(joint=False) - TINY.entropy()) < 1e-9
    assert any_order(joint=True) < TINY.entropy() - 0.01
