"""Noise of classes in two stages, all classes and then all words: each is masked noise, with all that is known of that.

-log p(x) <= bound on the classes of x + bound on x given its classes, by the chain rule, with one network.
Shapes: W windows of text, B rows, T positions, V ids of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.evaluation.order_cost import CostCurve, entropy_curve, equal_steps, price
from dlm.noise.classes import ClassNoise
from dlm.noise.loss import Predict
from dlm.noise.masked import MaskedNoise


def class_stage(noise: ClassNoise, predict: Predict) -> tuple[MaskedNoise, Predict]:
    """Masks become classes: masked noise on the numbers of the classes, and the network's prediction of those as logits."""
    first = noise.mask_id + 1

    def of_classes(z_BT: Tensor, t_B: Tensor) -> Tensor:
        z_BT = torch.where(z_BT == noise.classes, noise.mask_id, z_BT + first)
        p_BTV = noise.class_probs(noise.log_probs(predict(z_BT, t_B), z_BT).exp())
        p_BTC = torch.cat([p_BTV[..., first:], p_BTV[..., noise.mask_id : first]], -1)  # the mask last
        return p_BTC.clamp(min=torch.finfo(p_BTC.dtype).tiny).log()

    return MaskedNoise(noise.classes + 1, noise.classes, noise.schedule), of_classes


def word_stage(noise: ClassNoise, predict: Predict, classes_T: Tensor) -> tuple[MaskedNoise, Predict]:
    """Classes become words: masked noise on words, a mask read as the class of its position. classes_T: class numbers of all rows."""
    token_T = classes_T + noise.mask_id + 1

    def of_words(z_BT: Tensor, t_B: Tensor) -> Tensor:
        z_BT = torch.where(z_BT == noise.mask_id, token_T, z_BT)
        return noise.log_probs(predict(z_BT, t_B), z_BT)[..., : noise.mask_id + 1]

    return MaskedNoise(noise.mask_id + 1, noise.mask_id, noise.schedule), of_words


@dataclass(frozen=True)
class Stages:
    """The cost of a position of each stage, by how many others are known."""

    classes: CostCurve
    words: CostCurve

    def costs(self, kind: str) -> tuple[Tensor, Tensor]:
        """Of every count known, float64 (W, T) each. kind: `text`, cross-entropy on the text; `entropy`, of the network's marginals."""
        both = (curve.every(getattr(curve, f"{kind}_WK")) for curve in (self.classes, self.words))
        return next(both), next(both)

    def lost(self, steps: int, kind: str = "text") -> tuple[Tensor, Tensor, int]:
        """Nats that a text loses in so many steps, of classes and of words (W,), and the steps for classes that lose least on average."""
        class_WT, word_WT = self.costs(kind)
        length = class_WT.shape[1]
        found = [
            (price(class_WT, equal_steps(length, first)), price(word_WT, equal_steps(length, steps - first)), first)
            for first in range(max(1, steps - length), min(length, steps - 1) + 1)
        ]
        return min(found, key=lambda one: float(one[0].mean() + one[1].mean()))


@torch.no_grad()
def stages(
    noise: ClassNoise,
    predict: Predict,
    windows_WT: Tensor,
    *,
    levels: int = 33,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Stages:
    """Measure both curves on windows of real text; progress is told the rows read."""
    classes_WT = noise.class_tokens(windows_WT) - noise.mask_id - 1
    first = entropy_curve(*class_stage(noise, predict), classes_WT, levels=levels, seed=seed, progress=progress)
    each = [
        entropy_curve(*word_stage(noise, predict, classes_T), x_T[None], levels=levels, seed=seed + row, progress=progress)
        for row, (x_T, classes_T) in enumerate(zip(windows_WT, classes_WT, strict=True))
    ]
    entropy_WK, text_WK = (torch.cat([getattr(one, name) for one in each]) for name in ("entropy_WK", "text_WK"))
    return Stages(first, CostCurve(first.known_K, entropy_WK, text_WK, first.length))
