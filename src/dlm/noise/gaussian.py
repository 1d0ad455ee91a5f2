"""Gaussian noise on the one-hot vectors of tokens, with a softmax head and an exact bound.

VDM, Kingma et al. 2021 (2107.00630); I-MMSE, Guo et al. 2005 (cs/0412108); Plaid, Gulrajani et al. 2023 (2305.18619).
The state is not the vector itself but the evidence e = d (d onehot(x) + N(0, I)), with signal-to-noise ratio d^2: the log-likelihood of
each token, up to a constant of the position. So p(x_i | z) is the softmax of e_i plus log p(x_i | z without z_i), and a network that
gives the latter needs to read softmax(e) alone, the blend of tokens that a vector could be by itself, and no time.
Shapes: B rows, T positions, V vocabulary with the mask, whose entry is always 0. Losses in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.noise import argmax
from dlm.noise.schedule import Linear
from dlm.protocols import NoiseSchedule

CLEAN = 1e-4
"""1 - alpha at t = 0: the signal is finite there, and a token is told by its vector with so little doubt."""
CERTAIN = 1e4
"""Evidence of a token that is given."""


@dataclass(frozen=True)
class GaussianNoise:
    """alpha_t has its meaning for uniform noise: with the signal d_t the argmax of a vector is the token, or with 1 - alpha_t any token.

    So equal steps of a linear schedule tell about equal amounts. `ends`: both end terms of the bound count, whatever the schedule.
    """

    vocab_size: int
    mask_id: int
    schedule: NoiseSchedule = field(default_factory=Linear)
    ends = True

    def __post_init__(self) -> None:
        if self.vocab_size < 3:
            raise ValueError("noise on vectors needs two tokens beside the mask")

    def level(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """(signal d_t, its derivative by t), both (B,), in float64 where there is that."""
        alpha_B = self.schedule.alpha(t_B).clamp(0, 1)
        signal_B, slope_B = argmax.Signals.of(self.vocab_size - 1).at(alpha_B.clamp(max=1 - CLEAN))
        return signal_B, torch.where(alpha_B < 1 - CLEAN, slope_B * self.schedule.dalpha(t_B), 0.0)

    def _hot(self, x_BT: Tensor, like: Tensor) -> Tensor:
        return F.one_hot(x_BT, self.vocab_size).to(like.dtype)

    def without_mask(self, e_BTV: Tensor, fill: float) -> Tensor:
        """The same entries, `fill` at the mask's."""
        return e_BTV.masked_fill(torch.arange(self.vocab_size, device=e_BTV.device) == self.mask_id, fill)

    def evidence(self, x_BT: Tensor, t_B: Tensor, noise_BTV: Tensor) -> Tensor:
        """e_t of these tokens with this draw of N(0, I)."""
        d_B11 = self.level(t_B)[0].to(noise_BTV)[:, None, None]
        return self.of_vectors(d_B11 * self._hot(x_BT, noise_BTV) + noise_BTV, t_B)

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        """Draw the evidence at t given x. (B, T, V)."""
        return self.evidence(x_BT, t_B, torch.randn(*x_BT.shape, self.vocab_size, generator=rng, device=x_BT.device))

    def certain(self, x_BT: Tensor, e_BTV: Tensor) -> Tensor:
        """The evidence of tokens that are given, of the dtype of another."""
        return CERTAIN * self._hot(x_BT, e_BTV)

    def blend(self, e_BTV: Tensor) -> Tensor:
        """What a vector says by itself: weights of tokens that sum to 1."""
        return self.without_mask(e_BTV, -torch.inf).softmax(-1)

    def reading(self, network: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """Logits (B, T, V) in float32 of a `dlm.models` network that reads the blend of evidence."""

        def predict(e_BTV: Tensor, t_B: Tensor) -> Tensor:
            return network(e_BTV.argmax(-1), t_B, mixed_BQV=self.blend(e_BTV)).float()

        return predict

    def log_probs(self, logits_BTV: Tensor, e_BTV: Tensor, t_B: Tensor | None = None) -> Tensor:
        """log p(x_i | z) (B, T, V): the network's guess from the other vectors and the evidence of its own. The mask has probability 0."""
        return self.without_mask(logits_BTV + e_BTV, -torch.inf).log_softmax(-1)

    def denoised(self, logp_BTV: Tensor, e_BTV: Tensor, t_B: Tensor) -> Tensor:
        """`log_probs` again."""
        return logp_BTV

    def nelbo(self, logp_BTV: Tensor, x_BT: Tensor, e_BTV: Tensor, t_B: Tensor) -> Tensor:
        """1/2 |onehot(x) - mu|^2 d(d^2)/dt (B, T): the integrand of the I-MMSE relation, in which the mean mu stands for the vector."""
        signal_B, slope_B = self.level(t_B)
        error_BT = (self._hot(x_BT, logp_BTV) - logp_BTV.exp()).square().sum(-1)
        return (-signal_B * slope_B)[:, None] * error_BT

    def prior_cost(self, x_BT: Tensor) -> Tensor:
        """KL( q(e_1 | x) || N(0, d_1^2 I) ) = d_1^2 / 2 (B, T); 0 for a schedule that ends at exactly 0."""
        signal_B, _ = self.level(torch.ones(1, dtype=torch.float64, device=x_BT.device))
        return (signal_B.square() / 2).expand(x_BT.shape)

    def cross_entropy(self, logp_BTV: Tensor, x_BT: Tensor, e_BTV: Tensor, t_B: Tensor | None = None) -> Tensor:
        """-log p(x_i | z) (B, T)."""
        return -logp_BTV.gather(-1, x_BT[..., None]).squeeze(-1)

    def moved(self, y_BTV: Tensor, logp_BTV: Tensor, t_B: Tensor, s_B: Tensor, noise_BTV: Tensor | None) -> Tensor:
        """The vectors y = e / d at s < t from those at t and the guess there.

        noise_BTV: N(0, I) for the stochastic process, e_s = e_t + D mu + sqrt(D) N(0, I) with D = d_s^2 - d_t^2; None for the ordinary
        differential equation with the same marginals, in which y moves along mu.
        """
        d_B11, later_B11 = (self.level(at_B)[0].to(y_BTV)[:, None, None] for at_B in (t_B, s_B))
        mean_BTV = logp_BTV.exp().to(y_BTV)
        if noise_BTV is None:
            return y_BTV + (later_B11 - d_B11) * mean_BTV
        gain_B11 = (later_B11.square() - d_B11.square()).clamp(min=0)
        return (d_B11 * y_BTV + gain_B11 * mean_BTV + gain_B11.sqrt() * noise_BTV) / later_B11

    def of_vectors(self, y_BTV: Tensor, t_B: Tensor) -> Tensor:
        """The evidence e = d y of vectors at t."""
        return self.without_mask(self.level(t_B)[0].to(y_BTV)[:, None, None] * y_BTV, 0.0)
