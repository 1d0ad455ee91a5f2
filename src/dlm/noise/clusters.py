"""Which tokens are similar: groups of an embedding by k-means, or the classes of characters.

Shapes: V tokens of the vocabulary without the mask, D width, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlm import seeds


def k_means(embedding_VD: Tensor, count: int, *, seed: int = 0, restarts: int = 20, rounds: int = 100) -> list[int]:
    """The best of several runs of Lloyd's algorithm on the directions of the vectors, numbered by first appearance."""
    x_VD = torch.nn.functional.normalize(embedding_VD.double() - embedding_VD.double().mean(0), dim=-1)
    if not 1 <= count <= len(x_VD):
        raise ValueError(f"{len(x_VD)} tokens cannot form {count} clusters")
    rng, best, found = seeds.generator(seed), float("inf"), torch.zeros(len(x_VD), dtype=torch.long)
    for _ in range(restarts):
        centre_KD = x_VD[torch.randperm(len(x_VD), generator=rng)[:count]]
        for _ in range(rounds):
            distance_VK = torch.cdist(x_VD, centre_KD)
            nearest_V = distance_VK.argmin(-1)
            member_VK = torch.nn.functional.one_hot(nearest_V, count).double()
            moved_KD = (member_VK.T @ x_VD) / member_VK.sum(0).clamp(min=1)[:, None]
            moved_KD = torch.where(member_VK.sum(0)[:, None] > 0, moved_KD, centre_KD)
            if torch.equal(moved_KD, centre_KD):
                break
            centre_KD = moved_KD
        cost = float(distance_VK.min(-1).values.square().sum())
        if cost < best:
            best, found = cost, nearest_V
    return renumber(found.tolist())


def classes(pieces: Sequence[str]) -> list[int]:
    """Vowels, consonants, capitals of both, digits, white space, marks that end a clause, other signs; by the first character."""

    def kind(piece: str) -> str:
        first = piece[:1]
        if first.isalpha():
            return ("vowel" if first.lower() in "aeiouy" else "consonant") + ("-capital" if first.isupper() else "")
        return "digit" if first.isdigit() else "space" if first.isspace() else "stop" if first and first in ".,;:!?" else "sign"

    return renumber([kind(piece) for piece in pieces])


def shuffled(found: Sequence[int], *, seed: int = 0) -> list[int]:
    """Clusters of the same sizes with random members, numbered by first appearance."""
    order = torch.randperm(len(found), generator=seeds.generator(seed)).tolist()
    return renumber([found[i] for i in order])


def renumber(labels: Sequence[object]) -> list[int]:
    """0, 1, 2 ... in the order of first appearance."""
    order = {label: n for n, label in enumerate(dict.fromkeys(labels))}
    return [order[label] for label in labels]
