"""The signatures that everything else is written against.

Shapes: B rows, T positions of the whole canvas, Q positions queried in one forward pass, V vocabulary.
Time: t = 0 is data, t = 1 is noise; alpha_t is the probability that a token is still untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dlm.trajectory import Canvas, Frame


@dataclass(frozen=True)
class OwnDraws:
    """The generator of a row in a batch that may be wider: it draws for the `length` positions of the row alone."""

    generator: torch.Generator
    length: int

    @classmethod
    def of(cls, g: torch.Generator | OwnDraws, length: int) -> OwnDraws:
        return g if isinstance(g, OwnDraws) else cls(g, length)


RNG = Sequence[torch.Generator | OwnDraws]
"""One generator a row, so that the draws of a row do not depend on its neighbours."""


class NoiseSchedule(Protocol):
    """alpha decreases on [0, 1]; `alpha(0)` and `alpha(1)` are the end points, not always 1 and 0."""

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t."""

    def dalpha(self, t: Tensor) -> Tensor:
        """d alpha / dt, negative."""

    def inverse(self, alpha: Tensor) -> Tensor:
        """The t with alpha(t) = alpha."""


class NoiseProcess(Protocol):
    """A forward process q(z_t | x) that corrupts every token independently, with its posteriors and bounds."""

    @property
    def vocab_size(self) -> int:
        """Tokens with the mask."""

    @property
    def mask_id(self) -> int: ...

    @property
    def schedule(self) -> NoiseSchedule: ...

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

    def prior_cost(self, x_BT: Tensor) -> Tensor:
        """KL( q(z_1 | x) || p(z_1) ), nats per position (B, T)."""

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


class Sampler(Protocol):
    """A way to fill a canvas."""

    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """Yield a Frame after every step; the last one has no free position unsettled."""
