"""Harmonise a chorale: the soprano is given, a model fills in alto, tenor and bass, and they are written as MIDI and as a picture.

python examples/harmonise.py SCORES [MIDI] [STEPS]      # SCORES: a wheel of music21, a folder of .mxl files, or a score
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dlm
from dlm.files import check_target, replacing
from dlm.train import chorales, recipes

COLOURS = [(240, 200, 80), (120, 200, 120), (90, 160, 240), (220, 110, 150)]  # soprano, alto, tenor, bass


def roll(piece_SV: torch.Tensor) -> Image.Image:
    """Pitches against time; four lines below them are dark where a voice is still masked."""
    image = np.full((60, len(piece_SV), 3), 24, dtype=np.uint8)
    for voice, colour in enumerate(COLOURS):
        for begin, length, pitch in chorales.notes(piece_SV[:, voice].tolist()):
            image[chorales.HIGHEST - pitch + 2, begin : begin + length] = colour
            image[chorales.HIGHEST - pitch + 2, begin] = 255
        image[50 + 2 * voice, (piece_SV[:, voice] < len(chorales.SYMBOLS)).numpy()] = colour
    return Image.fromarray(image).resize((5 * len(piece_SV), 300), Image.Resampling.NEAREST)


def main(scores: str, out: str = "harmonised.mid", steps: str = "") -> None:
    check_target(Path(out))
    config, run = replace(recipes.find("chorales"), data=f"chorales:{scores}"), Path("runs/chorales")
    if not run.exists():
        dlm.fit(replace(config, steps=int(steps or config.steps)), run)  # minutes on one core
    model = dlm.load(str(run))
    piece_SV = chorales.split(chorales.read(scores), "val", config.val_fraction)[0]  # a melody that was not trained on
    row = [token if at % 4 == 0 else None for at, token in enumerate(piece_SV.flatten().tolist())]
    canvas, pictures, made_SV = dlm.Canvas.from_rows([row], fill=model.tokenizer.mask_id), [], piece_SV
    sampler = model.sampler(steps=model.window, temperature=0.8, context=128)
    for frame in sampler.steps(canvas, rng=[torch.Generator().manual_seed(0)]):
        made_SV = frame.tokens_BT.view(-1, 4)
        pictures.append(roll(made_SV))
    chorales.write_midi(made_SV, out)
    with replacing(Path(out).with_suffix(".gif")) as partial:
        first, *more = pictures[::8] + pictures[-1:]
        first.save(partial, format="GIF", save_all=True, append_images=more, duration=[120] * len(more) + [3000], loop=0)
    begins_SV = piece_SV[:, 1:] >= chorales.FIRST
    same = (made_SV[:, 1:] == piece_SV[:, 1:])[begins_SV].float().mean()
    print(f"{len(piece_SV)} sixteenths in {len(pictures)} forward passes; {same:.0%} of Bach's notes begin as his; written to {out}")


try:
    main(*sys.argv[1:])
except (dlm.InputError, OSError) as error:
    sys.stderr.write(f"harmonise.py: {error}\n")
    sys.exit(2)
