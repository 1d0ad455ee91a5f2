"""A noise process of your own: a noised token is drawn from the character frequencies of the text.

python examples/own_noise.py [TEXTS]
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import dlm
from dlm.noise import loss
from dlm.noise.replacement import Kernel, ReplacementNoise
from dlm.train.data import read


@dataclass(frozen=True)
class FrequencyNoise(ReplacementNoise):
    """q(z_t = y | x) = alpha_t [y = x] + (1 - alpha_t) f(y). Bound, reverse chain and samplers follow from three kernels."""

    frequencies: tuple[float, ...] = ()

    def _kernel(self, keep_B: Tensor, away_B: Tensor) -> Kernel:
        return Kernel(keep_B, torch.zeros_like(keep_B), away_B[:, None] * torch.tensor(self.frequencies).to(away_B))

    def kernel(self, t_B: Tensor) -> Kernel:  # from 0 to t
        return self._kernel(self.schedule.alpha(t_B), 1 - self.schedule.alpha(t_B))

    def between(self, s_B: Tensor, t_B: Tensor) -> Kernel:  # from s to t
        keep_B = self.schedule.alpha(t_B) / self.schedule.alpha(s_B)
        return self._kernel(keep_B, 1 - keep_B)

    def rate(self, t_B: Tensor) -> Kernel:  # of jumps at t
        return self._kernel(torch.zeros_like(t_B), -self.schedule.dalpha(t_B) / self.schedule.alpha(t_B))


rows = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
text = read("shakespeare")[0][: rows * 64]
tokenizer, rng = dlm.Tokenizer.characters(text), torch.Generator().manual_seed(0)
x_BT = torch.tensor(tokenizer.encode(text)).view(rows, 64)
f_V = torch.bincount(x_BT.flatten(), minlength=tokenizer.vocab_size + 1) / x_BT.numel()
noise = FrequencyNoise(tokenizer.vocab_size + 1, tokenizer.mask_id, frequencies=tuple(f_V.tolist()))
for t in (0.1, 0.5, 0.9):
    z_BT = noise.corrupt(x_BT[:1], torch.tensor([t]), rng)
    print(f"t = {t}: {tokenizer.decode(z_BT[0].tolist())!r}")

# A denoiser that knows the frequencies alone is exact for independent characters: its bound is their entropy.
nats_B = loss.counted(noise, lambda z_BT, t_B: f_V.log().expand(*z_BT.shape, -1), x_BT, torch.ones_like(x_BT, dtype=torch.bool), rng)
entropy = torch.special.entr(f_V).sum()
print(f"bound {nats_B.mean() / 64:.3f} +- {nats_B.std() / 64 / rows**0.5:.3f} nats per character, entropy {entropy:.3f}")
