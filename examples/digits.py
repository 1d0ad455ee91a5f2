"""Digits of 8 x 8 pixels as tokens of 17 grey levels, drawn by class with classifier-free guidance: tokens need not be text.

python examples/digits.py [STEPS] [DRAWN] [GIF]      # DRAWN: digits of each class
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import dlm
from dlm.files import replacing
from dlm.noise import loss
from dlm.sampling.diffusion.guidance import ClassifierFree
from dlm.sampling.draw import generators
from dlm.train.optimisers import Settings, learning_rate, make, set_learning_rate

try:
    from sklearn import datasets, neighbors
except ModuleNotFoundError:
    sys.exit("the digits come with scikit-learn: pip install scikit-learn")

words = dict(enumerate(sys.argv))
steps, drawn, out, mask_id = int(words.get(1, 1200)), int(words.get(2, 10)), Path(words.get(3, "digits.gif")), 17
pixels_NT, class_N = (torch.tensor(part).long() for part in datasets.load_digits(return_X_y=True))
x_NT = torch.cat([class_N[:, None].expand(-1, 8), pixels_NT], 1)  # a line that repeats the class above 8 x 8 pixels
config = dlm.TransformerConfig(18, window=72, layers=4, heads=4, width=64, axes=(9, 8), groups=((1, 8), (9, 1)), rope_base=100)
network, noise, rng = dlm.Transformer(config), dlm.MaskedNoise(18, mask_id), torch.Generator().manual_seed(0)
optimizer = make("muon", network, Settings(2e-3))


def nats(x_BT: torch.Tensor, any_class: float, equal: bool) -> torch.Tensor:
    """The bound. In a share of the rows the class is hidden: guidance also asks for a digit of any class."""
    free_BT = (torch.arange(72) >= 8).expand(len(x_BT), -1)
    hidden_BT = (torch.rand(len(x_BT), 1, generator=rng) < any_class) & ~free_BT
    return loss.any_order(noise, lambda z_BT, _: network(z_BT.masked_fill(hidden_BT, mask_id)), x_BT, free_BT, rng, equal=equal)


for step in range(steps):
    set_learning_rate(optimizer, learning_rate(step, peak=2e-3, steps=steps, warmup=50, decay_share=0.3))
    optimizer.zero_grad()
    nats(x_NT[torch.randint(len(x_NT) - 180, (32,), generator=rng)], 0.2, True).mean().backward()
    optimizer.step()
with torch.no_grad():
    nats_B = nats(x_NT[-180:].repeat(8, 1), 0.0, False).view(8, 180).mean(0) / 64
print(f"held-out digits: at most {nats_B.mean():.3f} +- {nats_B.std() / 180**0.5:.3f} nats a pixel")
judge = neighbors.KNeighborsClassifier(1).fit(pixels_NT[:-180], class_N[:-180])  # it recognises 97 % of the held-out digits
for scale in (1.0, 3.0):
    sampler = dlm.DiffusionSampler(network, noise, window=72, budget=64, guidance=ClassifierFree(scale, mask_id))
    canvas = dlm.Canvas.from_rows([[n % 10] * 8 + [None] * 64 for n in range(10 * drawn)], fill=mask_id)
    frames = [frame.tokens_BT[:, 8:] for frame in sampler.steps(canvas, rng=generators(0, 10 * drawn))]
    share = judge.score(frames[-1], list(range(10)) * drawn)
    print(f"guidance scale {scale}: {share:.0%} of the drawn digits are recognised as their class")
grey_V3 = torch.cat([torch.arange(17)[:, None].expand(-1, 3) * 15, torch.tensor([[40, 60, 130]])]).byte()  # a mask is blue
cells = (torch.nn.functional.pad(pixels_BT.view(drawn, 10, 8, 8), (1, 1, 1, 1)) for pixels_BT in frames)
sheets = (grey_V3[cell.transpose(1, 2).reshape(10 * drawn, 100)].numpy() for cell in cells)
first, *more = (Image.fromarray(sheet).resize((500, 50 * drawn), Image.Resampling.NEAREST) for sheet in sheets)
with replacing(out) as partial:
    first.save(partial, format="GIF", save_all=True, append_images=more, duration=[80] * len(more) + [2000], loop=0)
