"""The five signatures that everything else is written against.

Shapes: B rows, T positions of the whole canvas, Q positions queried in one call, V vocabulary.
Time: t = 0 is data, t = 1 is noise; alpha_t is the probability that a token is still untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dlm.trajectory import Canvas, Frame

RNG = Sequence[torch.Generator]
"""One generator a row, so that what a row draws does not depend on its neighbours."""


@runtime_checkable
class NoiseProcess(Protocol):
    """A forward process q(z_t | x) that corrupts every token independently, and what follows from it."""

    vocab_size: int

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z_t given x; int64 (B, T)."""

    def prior(self, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
        """Draw z_1; int64 of that shape."""

    def log_probs(self, logits_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """Network output -> log mu(x | z, t), normalised, with what the process knows for certain put in."""

    def posterior(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """p(z_s | z_t) for s < t, probabilities (B, T, V)."""

    def nelbo(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """Integrand of the continuous-time bound at t, nats per position (B, T)."""


class Cache(Protocol):
    """Keys and values of positions already read."""

    length: int

    def trim(self, length: int) -> None:
        """Forget every position from `length` on."""


class Denoiser(Protocol):
    """A network. Q = T is plain diffusion, Q = 1 autoregression, Q = block block diffusion."""

    def __call__(
        self,
        z_BQ: Tensor,
        t_B: Tensor | None = None,
        *,
        pos_BQ: Tensor | None = None,
        valid_BT: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Logits (B, Q, V)."""


@dataclass(frozen=True)
class Step:
    """What a rule sees: the active window of every row that moves now, each row at its own step.

    z_BT: the state; open_BT: positions to consider (those due now, else all that are still noise); free_BT: every position
    the sampler may write; logp_BTV: log mu(x | z); t_B -> s_B: the move; left_B: steps left, this one included.
    """

    z_BT: Tensor
    open_BT: Tensor
    free_BT: Tensor
    logp_BTV: Tensor
    t_B: Tensor
    s_B: Tensor
    left_B: Tensor


class Rule(Protocol):
    """One reverse move inside the active window; a frozen dataclass, so that it prints and goes into the run record."""

    def due(self, open_BT: Tensor, alphas_N: Tensor, rng: RNG) -> Tensor | None:
        """The step (0 .. N - 1) at which each open position moves, if known before the network is asked; else None.

        alphas_N: the chance that a position masked at t = 1 is revealed by the end of each step. The loop calls the
        network only for steps in which something moves.
        """

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        """The next z, int64 (B, T)."""


class Sampler(Protocol):
    """Anything that fills a canvas."""

    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """Yield a Frame after every step; the last one has no free position unsettled."""
