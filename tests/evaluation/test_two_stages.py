"""Classes and then words, each as masked noise: the chain rule on an enumerated distribution, and the loss of deciding several at once."""

from __future__ import annotations

import pytest
import torch

from dlm.evaluation import two_stages
from dlm.noise import process
from dlm.noise.classes import ClassNoise
from oracle import ClassBayes, Tiny

TINY = Tiny(4, 2, seed=3)
NOISE = process.make({"process": "classes", "clusters": [0, 1, 0, 1]}, 7, 4)


def entropy(p: torch.Tensor) -> float:
    return float(torch.special.entr(p).sum())


def class_probs() -> torch.Tensor:
    """Of the four sequences of classes."""
    class_ST = TINY.x_ST % 2
    return torch.zeros(4, dtype=torch.float64).index_add(0, (class_ST * torch.tensor([2, 1])).sum(-1), TINY.p_S)


@pytest.fixture(scope="module")
def found() -> two_stages.Stages:
    """The curves of the exact posterior, over all texts."""
    assert isinstance(NOISE, ClassNoise)
    return two_stages.stages(NOISE, ClassBayes(TINY, NOISE), TINY.x_ST, levels=2, seed=1)


def test_the_stages_are_the_chain_rule(found: two_stages.Stages) -> None:
    """Nats of a text weighted by its probability, masks drawn: what is drawn varies little."""
    classes, words = ((cost_WT.sum(-1) * TINY.p_S).sum().item() for cost_WT in found.costs("text"))
    assert classes == pytest.approx(entropy(class_probs()), abs=0.05)
    assert words == pytest.approx(TINY.entropy() - entropy(class_probs()), abs=0.1)


def test_one_step_for_each_loses_what_is_shared(found: two_stages.Stages) -> None:
    """All classes at once lose their total correlation; one position a step loses nothing."""
    at_once = [torch.zeros(2, dtype=torch.float64).index_add(0, TINY.x_ST[:, i] % 2, TINY.p_S) for i in range(2)]
    correlation = sum(map(entropy, at_once)) - entropy(class_probs())
    class_W, word_W, first = found.lost(2)
    assert first == 1
    assert (class_W * TINY.p_S).sum().item() == pytest.approx(correlation, abs=0.05)
    assert (word_W * TINY.p_S).sum().item() > 0
    for part in found.lost(4)[:2]:
        assert part.abs().max() < 1e-12


def test_a_class_is_read_as_the_mask_of_its_position() -> None:
    """The words of the second stage are of the class that stands there, those that are written are certain."""
    assert isinstance(NOISE, ClassNoise)
    noise, predict = two_stages.word_stage(NOISE, ClassBayes(TINY, NOISE), torch.tensor([0, 1]))
    z_BT = torch.tensor([[4, 4], [4, 3]])
    p_BTV = noise.log_probs(predict(z_BT, torch.zeros(2)), z_BT).exp()
    assert (p_BTV[:, 0, [1, 3]] == 0).all()
    assert (p_BTV[0, 1, [0, 2]] == 0).all()
    assert p_BTV[1, 1, 3] == 1
    assert torch.allclose(p_BTV.sum(-1), torch.ones(2, 2, dtype=torch.float64))
