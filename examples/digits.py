"""Digits of 8 x 8 pixels as tokens of 17 grey levels, drawn by class with classifier-free guidance: tokens need not be text.

python examples/digits.py [STEPS] [DRAWN] [GIF]      # DRAWN: digits of each class
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dlm
from dlm.sampling.draw import generators

try:
    from sklearn import datasets, neighbors
except ModuleNotFoundError:
    sys.exit("the digits come with scikit-learn: pip install scikit-learn")

words = dict(enumerate(sys.argv))
steps, drawn, out = int(words.get(1, 1200)), int(words.get(2, 10)), words.get(3, "digits.gif")
pixels_NT, class_N = datasets.load_digits(return_X_y=True)
names_N8 = 17 + class_N[:, None].repeat(8, 1)  # the class fills a line above the pixels: ten more tokens
np.save("digits.npy", np.concatenate([names_N8, pixels_NT], 1).reshape(-1, 9, 8).astype(np.uint8))
config = dlm.TrainConfig(data="digits.npy", steps=steps, batch=32, warmup=50, ema=0.99)
if not Path("runs/digits").exists():
    fit = dlm.fit(config.with_settings(["layers=4", "heads=4", "width=64"]), "runs/digits")
    print(f"held-out digits with their class: at most {fit.val_nats:.3f} +- {fit.val_stderr:.3f} nats a cell")

model = dlm.load("runs/digits")
canvas = dlm.Canvas.from_rows([[17 + n % 10] * 8 + [None] * 64 for n in range(10 * drawn)], fill=model.tokenizer.mask_id)
judge = neighbors.KNeighborsClassifier(1).fit(pixels_NT[:-180], class_N[:-180])  # it recognises 97 % of the held-out digits
for scale in (1.0, 3.0):
    sampler = model.sampler(steps=64, guidance=scale)
    frames = [frame.tokens_BT[:, 8:] for frame in sampler.steps(canvas, rng=generators(0, 10 * drawn))]
    share = judge.score(frames[-1], list(range(10)) * drawn)
    print(f"guidance scale {scale}: {share:.0%} of the drawn digits are recognised as their class")

grey_V3 = np.array([[15 * level] * 3 for level in range(17)] + [[0, 0, 0]] * 10 + [[40, 60, 130]], dtype=np.uint8)  # a mask is blue
cells = [torch.nn.functional.pad(frame.view(drawn, 10, 8, 8), (1, 1, 1, 1)).transpose(1, 2).reshape(10 * drawn, 100) for frame in frames]
first, *more = (Image.fromarray(grey_V3[cell]).resize((500, 50 * drawn), Image.Resampling.NEAREST) for cell in cells)
first.save(out, save_all=True, append_images=more, duration=[80] * len(more) + [2000], loop=0)
