"""Noise whose weights are learned with the network: what training asks of such a process, and the gradient of its bound.

MD4's generalisation, GenMD4 (Shi et al. 2024, arXiv 2406.04329, section 6): each weight is the exponent w of one masking probability,
(1 - alpha_t)^w. The noise that a loss is measured on then depends on the weights, and so does the gradient: besides the explicit part
there is the score of the draw, whose variance falls when two draws for one text are compared (REINFORCE, leave one out).
Shapes: B rows, T positions, N weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dlm.noise.schedule import is_whole
from dlm.protocols import NoiseSchedule

COPIES = 2  # draws of noise for each text of a training step


@dataclass(frozen=True)
class Drawn:
    """One draw of noise for each row, all (B,), in nats.

    network_B: the loss of the network, in which the weights count as given. bound_B: an unbiased estimate of the bound, in which the
    predictions count as given. log_q_B: log-probability of the draw. The last two can be derived with respect to the log-weights.
    """

    network_B: Tensor
    bound_B: Tensor
    log_q_B: Tensor


class LearnedNoise(ABC):
    """A frozen dataclass of noise with a field `weights` and one `live`, which stands in for them while they are learned.

    weights: exponents above 0; none means 1 each. live: their logarithms, up to a common summand: all weights to the power c are the same
    process by another clock, so the mean of the logarithms is fixed at 0. reads_time: whether the best network does.
    """

    reads_time: ClassVar[bool] = False
    schedule: NoiseSchedule
    weights: tuple[float, ...]
    live: Tensor | None

    @abstractmethod
    def count(self, window: int) -> int:
        """How many weights there are for windows of that length."""

    @abstractmethod
    def draw(
        self, predict: Callable[[Tensor, Tensor], Tensor], x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, u_B: Tensor, *, equal: bool
    ) -> Drawn:
        """Noise on every row at the level of a uniform draw, and its costs.

        equal: levels from Beta(2, 2), and in the loss of the network every masked token alike whatever the level.
        """

    def counts(self, live_N: Tensor) -> Tensor:
        """Of these log-weights the ones whose mean is fixed."""
        return live_N

    def check(self, window: int) -> None:
        """ValueError unless there is a weight for each place of a window."""
        if self.weights and len(self.weights) != (count := self.count(window)):
            raise ValueError(f"{len(self.weights)} weights, for windows of {window} there are {count}")

    def check_weights(self) -> None:
        """ValueError for weights that are not above 0, and for a schedule with end terms."""
        if not all(0 < w < float("inf") for w in self.weights):
            raise ValueError("the weights of noise are numbers above 0")
        if not is_whole(self.schedule):
            raise ValueError("weights of noise need a schedule from exactly 1 to exactly 0, such as linear")

    def weight_N(self, count: int, like: Tensor) -> Tensor:
        """The weights (N,) on the device of a tensor, in float64 where it has that."""
        if self.live is not None:
            return (self.live - self.counts(self.live).mean()).exp().to(like.device)
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        if not self.weights:
            return torch.ones(count, dtype=dtype, device=like.device)
        if len(self.weights) != count:
            raise ValueError(f"{len(self.weights)} weights cannot be those of {count} places")
        return self._stored_N.to(like.device, dtype)

    @cached_property
    def _stored_N(self) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64)

    def learning(self, live: Tensor) -> Self:
        """The same process with log-weights that are being learned."""
        made: Self = replace(self, live=live)  # type: ignore[type-var]
        return made

    def held(self) -> Self:
        """The same process with weights that no gradient reaches."""
        return self if self.live is None else self.learning(self.live.detach())

    def fixed(self) -> tuple[float, ...]:
        """The learned weights as numbers, which give the same process to the bit."""
        assert self.live is not None
        return tuple(self.held().weight_N(len(self.live), self.live).tolist())


def training_loss(
    noise: Any,
    predict: Callable[[Tensor, Tensor], Tensor],
    x_BT: Tensor,
    free_BT: Tensor,
    rng: torch.Generator,
    u_B: Tensor,
    *,
    equal: bool = False,
) -> Tensor:
    """The loss of the network (B,), whose mean over the rows has the gradient of the bound with respect to the log-weights as well.

    Rows 2i and 2i + 1 are one text at one level with two draws of noise: each is the other's baseline. ValueError for an odd number.
    """
    if len(x_BT) % COPIES:
        raise ValueError(f"rows come in pairs, got {len(x_BT)}")
    drawn = noise.draw(predict, x_BT, free_BT, rng, u_B, equal=equal)
    cost_B = drawn.bound_B.detach()
    other_B = cost_B.view(-1, COPIES).flip(1).reshape(-1)
    of_weights_B = drawn.bound_B + (cost_B - other_B) * drawn.log_q_B
    loss_B: Tensor = drawn.network_B + of_weights_B - of_weights_B.detach()
    return loss_B
