"""The signatures that everything else is written against.

Shapes: B rows, T positions of the whole canvas, Q positions queried in one forward pass, V vocabulary.
Time: t = 0 is data, t = 1 is noise; alpha_t is the probability that a token is still untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dlm.trajectory import Canvas, Frame


@dataclass(frozen=True)
class OwnDraws:
    """The generator of a row in a batch that may be wider: it draws for the `length` positions of the row alone."""

    generator: torch.Generator
    length: int

    @classmethod
    def of(cls, g: Draws, length: int) -> Draws:
        return cls(g, length) if isinstance(g, torch.Generator) else g


@dataclass(frozen=True)
class SomeDraws:
    """The generator of a row of which some positions are asked: it draws for all `width` of them, (T,), and `pick` takes some, (C,)."""

    own: Draws
    width: int
    pick: Callable[[Tensor], Tensor]


Draws = torch.Generator | OwnDraws | SomeDraws
RNG = Sequence[Draws]
"""One generator a row, so that the draws of a row do not depend on its neighbours."""


class NoiseSchedule(Protocol):
    """alpha decreases on [0, 1]; `alpha(0)` and `alpha(1)` are the end points, not always 1 and 0."""

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t."""

    def dalpha(self, t: Tensor) -> Tensor:
        """d alpha / dt, negative."""

    def inverse(self, alpha: Tensor) -> Tensor:
        """The t with alpha(t) = alpha."""


class BoundedProcess(Protocol):
    """A forward process q(z_t | x) that corrupts every token independently, with a continuous-time bound.

    z is made of tokens, int64 (B, T), or under noise on vectors of the evidence for each token, (B, T, V).
    """

    @property
    def vocab_size(self) -> int:
        """Tokens with the mask."""

    @property
    def mask_id(self) -> int: ...

    @property
    def schedule(self) -> NoiseSchedule: ...

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator, /) -> Tensor:
        """Draw z_t given x."""

    def log_probs(self, logits_BTV: Tensor, z: Tensor, t_B: Tensor, /) -> Tensor:
        """Network output -> the log-probabilities of tokens (B, T, V) that the other methods take, normalised."""

    def nelbo(self, logp_BTV: Tensor, x_BT: Tensor, z: Tensor, t_B: Tensor, /) -> Tensor:
        """Integrand of the continuous-time bound at t, nats per position (B, T)."""

    def prior_cost(self, x_BT: Tensor, /) -> Tensor:
        """KL( q(z_1 | x) || p(z_1) ), nats per position (B, T)."""

    def cross_entropy(self, logp_BTV: Tensor, x_BT: Tensor, z: Tensor, t_B: Tensor, /) -> Tensor:
        """-log p(x_i | z) (B, T)."""


class NoiseProcess(BoundedProcess, Protocol):
    """Noise on tokens, with its posteriors and the bound of a discrete grid."""

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z_t given x; int64 (B, T)."""

    def renoise(self, z_BT: Tensor, s_B: Tensor, t_B: Tensor, u_BT: Tensor) -> Tensor:
        """Draw z_t given z_s, s <= t, from one uniform a position; int64 (B, T)."""

    def prior(self, u_BT: Tensor) -> Tensor:
        """Draw z_1 from one uniform a position; int64 (B, T)."""

    def log_probs(self, logits_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """Network output -> log mu(x_i | z without z_i), normalised, a visible token under masked noise certain."""

    def denoised(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """log mu -> log p(x_i | z), z_i included."""

    def posterior(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """p(z_s | z_t) for s < t, probabilities (B, T, V)."""

    def nelbo(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """Integrand of the continuous-time bound at t, nats per position (B, T)."""

    def nelbo_step(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """KL of one step of a discrete grid, nats per position (B, T)."""

    def cross_entropy(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """-log p(x_i | z) (B, T)."""


class Denoiser(Protocol):
    """A network. Q = T is plain diffusion, Q = 1 autoregression, Q = block block diffusion."""

    def __call__(
        self,
        z_BQ: Tensor,
        t_B: Tensor | None = None,
        /,
        *,
        pos_BQ: Tensor | None = None,
        valid_BT: Tensor | None = None,
        cache: Any = None,
        pattern: str = "",
        own_BQQ: Tensor | None = None,
        at_BQ: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, Q, V). at_BQ: the only positions whose logits are needed. own_BQQ: the new positions that each new one reads,
        besides those that a `RaggedCache` holds. states: gets the last hidden states (B, Q, D), for a drafter that reads them.

        pattern `shadow`: z is [text | masks], and a mask predicts its position without reading the text there.
        """


@runtime_checkable
class PickingDenoiser(Protocol):
    """A denoiser that computes the logits of some positions of each row alone: `index_BC`, int64 (B, C), gives logits (B, C, V)."""

    @property
    def picks(self) -> bool:
        """Whether it does."""

    def __call__(
        self, z_BQ: Tensor, t_B: Tensor | None = None, /, *, index_BC: Tensor | None = None, cache: Any = None, **how: Any
    ) -> Tensor:
        """Logits (B, C, V)."""


class Sampler(Protocol):
    """A way to fill a canvas."""

    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """Yield a Frame after every step; the last one has no free position unsettled."""
