"""A denoiser of your own: counts of character pairs in place of a network.

python examples/own_denoiser.py [STEPS]
"""

import sys

import torch
from torch import Tensor

import dlm
from dlm.sampling.draw import generators
from dlm.train.data import read


class Bigrams:
    """Logits log p(x | left neighbour) + log p(right neighbour | x), from counts. A masked neighbour tells nothing."""

    def __init__(self, ids_N: Tensor, size: int, mask_id: int) -> None:
        self.mask_id = mask_id
        counts_VV = torch.full((size, size), 0.01)
        counts_VV.index_put_((ids_N[:-1], ids_N[1:]), torch.ones(len(ids_N) - 1), accumulate=True)
        counts_VV[mask_id] = counts_VV.sum(0)
        self.logp_VV = (counts_VV / counts_VV.sum(1, keepdim=True)).log()
        self.logp_VV[:, mask_id] = 0.0

    def __call__(self, z_BT: Tensor, t_B: Tensor | None = None, **_: object) -> Tensor:
        edge_B1 = torch.full_like(z_BT[:, :1], self.mask_id)
        left_BT, right_BT = torch.cat([edge_B1, z_BT[:, :-1]], 1), torch.cat([z_BT[:, 1:], edge_B1], 1)
        return self.logp_VV[left_BT] + self.logp_VV.T[right_BT]


text = read("shakespeare")[0]
tokenizer = dlm.Tokenizer.characters(text)
size, mask_id = tokenizer.vocab_size + 1, tokenizer.mask_id
denoiser = Bigrams(torch.tensor(tokenizer.encode(text)), size, mask_id)

# Every sampler takes it: the sampler asks for logits (B, T, V) of noisy tokens (B, T) and knows no network.
sampler = dlm.DiffusionSampler(denoiser, dlm.MaskedNoise(size, mask_id), window=64, budget=int(sys.argv[1]) if len(sys.argv) > 1 else 64)
canvas = dlm.Canvas.from_rows([[*tokenizer.encode("ROMEO:"), *[None] * 58]], fill=mask_id)
for frame in sampler.steps(canvas, rng=generators(0, rows=1)):
    print("".join("█" if i == mask_id else tokenizer.piece(i) for i in frame.tokens_BT[0].tolist()).replace("\n", " "))
