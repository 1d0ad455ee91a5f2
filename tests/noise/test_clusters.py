"""Which tokens count as similar: groups that were planted are found, and always the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlm.noise import clusters


def planted(groups: int = 4, each: int = 6, spread: float = 0.1) -> tuple[Tensor, list[int]]:
    """Vectors around random directions, shuffled, with the group of each; lengths that say nothing."""
    rng = torch.Generator().manual_seed(0)
    centre_KD = torch.linalg.qr(torch.randn(8, groups, generator=rng)).Q.T
    order = torch.randperm(groups * each, generator=rng)
    label_V = order % groups
    noise_VD = spread * torch.randn(groups * each, 8, generator=rng)
    length_V1 = torch.rand(groups * each, 1, generator=rng) * 5 + 0.5
    return (centre_KD[label_V] + noise_VD) * length_V1, label_V.tolist()


def test_k_means_finds_planted_groups() -> None:
    for groups in (2, 4, 6):
        embedding_VD, label = planted(groups)
        assert clusters.k_means(embedding_VD, groups) == clusters.renumber(label)


def test_k_means_is_deterministic_and_takes_any_count() -> None:
    embedding_VD = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    state = torch.random.get_rng_state()
    for count in (1, 3, 29, 30):
        found = clusters.k_means(embedding_VD, count)
        assert found == clusters.k_means(embedding_VD.clone(), count)
        assert found == clusters.renumber(found)
        assert max(found) < count
    assert sorted(clusters.k_means(embedding_VD, 30)) == list(range(30))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_more_restarts_are_never_worse() -> None:
    """The cost that is minimised, counted here on its own: distances to the means of the directions."""
    embedding_VD = torch.randn(40, 4, generator=torch.Generator().manual_seed(2)).double()
    x_VD = torch.nn.functional.normalize(embedding_VD - embedding_VD.mean(0), dim=-1)

    def cost(found: list[int]) -> float:
        label_V = torch.tensor(found)
        return sum(float((x_VD[label_V == c] - x_VD[label_V == c].mean(0)).square().sum()) for c in set(found))

    costs = [cost(clusters.k_means(embedding_VD, 6, restarts=restarts)) for restarts in (1, 5, 20)]
    assert costs[0] >= costs[1] >= costs[2]
    assert costs[0] > costs[2]
    random = [cost(torch.randint(6, (40,), generator=torch.Generator().manual_seed(seed)).tolist()) for seed in range(20)]
    assert costs[2] < 0.5 * min(random)


@pytest.mark.parametrize("count", [0, -1, 25])
def test_counts_that_cannot_be_are_told(count: int) -> None:
    with pytest.raises(ValueError, match=f"24 tokens cannot form {count} clusters"):
        clusters.k_means(planted()[0], count)


def test_classes_of_characters() -> None:
    pieces = ["a", "b", "e", "E", "B", "y", "7", "\n", " ", ".", "!", "&", "'", "0", "the", " the"]
    kinds = "vowel consonant vowel VOWEL CONSONANT vowel digit space space stop stop sign sign digit consonant space"
    assert clusters.classes(pieces) == clusters.renumber(kinds.split())


def test_renumber_counts_in_the_order_of_first_appearance() -> None:
    assert clusters.renumber(["b", "a", "b", "c", "a"]) == [0, 1, 0, 2, 1]
    assert clusters.renumber([7, 7, 3]) == [0, 0, 1]
    assert clusters.renumber([]) == []
