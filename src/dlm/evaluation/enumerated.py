"""The bound of a masked model on a distribution that can be enumerated: its entropy, and how much the model is above it.

With the exact posterior the any-order bound of a uniform distribution over G rows is log G. The model's excess is the mean KL divergence
of its predictions at masks from that posterior's, over the numbers of masks, which has little variance: no token is drawn.
Shapes: G rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.evaluation.statistics import standard_error
from dlm.noise.loss import Predict
from dlm.noise.masked import MaskedNoise


@dataclass(frozen=True)
class Excess:
    """Nats of a whole row. entropy: log G, which no bound is below; excess: of the model's bound over it; stderr: over draws of masks."""

    entropy: float
    excess: float
    stderr: float

    @property
    def bound(self) -> float:
        return self.entropy + self.excess


def posterior(rows_GT: Tensor, z_BT: Tensor, noise: MaskedNoise) -> Tensor:
    """log p(x_i | z), float64 (B, T, V), of rows that are equally likely."""
    fits_BG = ((z_BT[:, None] == rows_GT) | (z_BT[:, None] == noise.mask_id)).all(-1).double()
    found_BTV = torch.einsum("bg,gtv->btv", fits_BG, F.one_hot(rows_GT, noise.vocab_size).double())
    return (found_BTV / fits_BG.sum(-1)[:, None, None]).log()


@torch.no_grad()
def excess(noise: MaskedNoise, predict: Predict, rows_GT: Tensor, *, draws: int = 4, seed: int = 0) -> Excess:
    """The bound on the uniform distribution over these distinct rows, from so many draws of masks for each row and number of masks."""
    (rows, length), rng = rows_GT.shape, torch.Generator().manual_seed(seed)
    nats_N = []
    for _ in range(draws):
        total = 0.0
        for count in range(1, length + 1):
            masked_GT = torch.rand(rows, length, generator=rng).argsort(-1) < count
            z_GT, t_G = rows_GT.masked_fill(masked_GT, noise.mask_id), torch.full((rows,), count / length, dtype=torch.float64)
            exact_GTV, found_GTV = posterior(rows_GT, z_GT, noise), noise.log_probs(predict(z_GT, t_G), z_GT, t_G).double()
            kl_GT = (exact_GTV.exp() * (exact_GTV.clamp(min=-1e9) - found_GTV.clamp(min=-1e9))).sum(-1)
            total += kl_GT[masked_GT].mean().item()
        nats_N.append(total)
    values_N = torch.tensor(nats_N, dtype=torch.float64)
    return Excess(math.log(rows), values_N.mean().item(), standard_error(values_N).item())
