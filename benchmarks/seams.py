"""Does a long text show where its windows join? Bits under an autoregressive judge near the joins and elsewhere.

    python benchmarks/seams.py                 # 8 texts of 1,600 characters, 64 steps for each window
    python benchmarks/seams.py --model shakespeare-block --contexts 64 192 240 --length 10240 --texts 2

Every character is judged from at least 128 characters before it, so the judge's own windows leave no pattern. `context 0` is the
same model without carrying text over: the seam that there would be. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dlm
from dlm.evaluation import card
from dlm.evaluation.statistics import Mean

NEAR_JOIN = 16  # characters after a join that count as near it


@torch.no_grad()
def judged(twin: dlm.LanguageModel, texts_NL: Tensor, stride: int = 128) -> Tensor:
    """Bits of every character from position 128 on, judged in windows that move by `stride`; (N, L), NaN before."""
    bits_NL = torch.full(texts_NL.shape, math.nan, dtype=torch.float64)
    window = twin.window
    for begin in range(0, texts_NL.shape[1] - window + 1, stride):
        x_NT = texts_NL[:, begin : begin + window]
        inputs = torch.cat([torch.full_like(x_NT[:, :1], twin.tokenizer.mask_id), x_NT[:, :-1]], 1)
        logits = twin.network(inputs).double()
        logits[..., twin.tokenizer.mask_id] = -torch.inf
        nats = -logits.log_softmax(-1).gather(-1, x_NT[..., None]).squeeze(-1)
        bits_NL[:, begin + window - stride : begin + window] = nats[:, window - stride :] / math.log(2)
    return bits_NL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shakespeare-mask")
    parser.add_argument("--twin", default="shakespeare-ar")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--contexts", type=int, nargs="+", help="characters carried into the next window; default: the model's own, and 0")
    parser.add_argument("--quick", action="store_true", help="one short text: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.texts, args.length, args.steps = 2, 640, 4
    model, twin = dlm.load(args.model), dlm.load(args.twin)
    rows = []
    table = Table("context", "near a join", "elsewhere", "difference", box=None)
    for context in args.contexts or (model.context, 0):
        lm = dlm.LanguageModel(model.network, dataclasses.replace(model.config, context=context), model.tokenizer, model.name)
        results = lm.generate([""] * args.texts, length=args.length, steps=args.steps, seed=0)
        texts_NL = results[0].trajectory.current_BT
        bits_NL = judged(twin, texts_NL)
        position_L = torch.arange(args.length)
        since_L = (position_L - context) % (lm.window - context)
        near_L = (since_L < NEAR_JOIN) & (position_L >= lm.window)
        far_L = (since_L >= NEAR_JOIN) & (position_L >= lm.window)
        near_N, far_N = bits_NL[:, near_L].nanmean(1), bits_NL[:, far_L].nanmean(1)
        near, far, gap = Mean.of(near_N), Mean.of(far_N), Mean.of(near_N - far_N)
        rows.append({"context": context} | {name: dataclasses.asdict(m) for name, m in (("near", near), ("elsewhere", far), ("gap", gap))})
        table.add_row(str(context), *(f"{m.value:.3f} +- {m.stderr:.3f}" for m in (near, far, gap)))
    Console().print(table)
    print("bits per character under the judge; the difference is paired by text")
    settings = vars(args) | {"near": NEAR_JOIN}
    print(card.dumps(card.make({"rows": rows}, device="cpu", dtype="float32", seed=0, settings=settings, data={})))


if __name__ == "__main__":
    main()
