"""Does less meaning per token make the curse of parallel decoding worse? One text, one parameter count, one compute; characters, bytes, subwords.

    python benchmarks/granularity.py                   # trains what is missing, then measures: two hours of one core
    python benchmarks/granularity.py --compute 1e16 --parameters 2e7 --batch 128 --device cuda

Windows span about 256 characters of text, widths are chosen so that all networks have the same number of parameters (the head is the
embedding), and compute is 6 x parameters x tokens. Runs are kept in --out and resumed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import dlm
from dlm import recipes
from dlm.text import Tokenizer
from dlm.train import data as reading
from dlm.train.config import TrainConfig
from dlm.train.loop import train

KINDS = ("chars", "bytes", "bpe:256", "bpe:1024", "bpe:4096", "bpe:16384")
SPAN = 256  # characters of a window, about


def design(kind: str, text: str, args: argparse.Namespace) -> TrainConfig:
    """The run of one vocabulary: its window, width and steps."""
    base = recipes.shakespeare_mask()
    tokenizer = Tokenizer.make(kind, text)
    window = round(SPAN * len(tokenizer.encode_corpus([text])) / len(text) / 8) * 8
    network = base.network.with_(layers=args.layers, window=window, tied=True, head_dim=32, heads=4, width=2)

    def count(width: int) -> int:
        sized = network.with_(width=width, heads=4, head_dim=32, vocab_size=tokenizer.vocab_size + 1)
        return dlm.Transformer(sized).parameters_count()

    width = min(range(16, 513, 2), key=lambda w: abs(count(w) - args.parameters))
    steps = max(2, round(args.compute / (6 * count(width) * args.batch * SPAN)))
    batch = args.batch * SPAN // window  # the same tokens in every step
    config = replace(base, network=network.with_(width=width, heads=4, head_dim=32), tokenizer=kind, context=0, context_share=0.0)
    config = replace(config, steps=steps, batch=batch, warmup=min(100, steps // 4), eval_windows=64, compile=args.compile)
    return replace(config, eval_every=max(1, steps // 4), save_every=max(1, steps // 8))


def done(out: Path, steps: int) -> bool:
    log = out / "log.jsonl"
    return log.is_file() and any(json.loads(line).get("step") == steps for line in log.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--compute", type=float, default=2e13, help="FLOPs of one run")
    parser.add_argument("--parameters", type=float, default=1e6)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens a step")
    parser.add_argument("--out", type=Path, default=Path("runs/granularity"))
    parser.add_argument("--train-only", action="store_true", help="leave the measurement to a later call")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    console = Console(stderr=True)
    text = "\n".join(reading.read(recipes.SHAKESPEARE))
    for kind in args.kinds:
        config, out = design(kind, text, args), args.out / kind.replace(":", "-")
        console.print(f"{kind}: window {config.network.window}, width {config.network.width}, {config.steps} steps", highlight=False)
        if not done(out, config.steps):
            train(config, out, resume=(out / "training.safetensors").is_file(), console=console)


if __name__ == "__main__":
    main()
