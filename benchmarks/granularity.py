"""Does less meaning per token make the curse of parallel decoding worse? One text, size and compute; characters, bytes, subwords.

    python benchmarks/granularity.py --plot docs/granularity.png    # trains the missing models, then measures: hours of one core
    python benchmarks/granularity.py --seeds 0 --bf16               # one training seed
    python benchmarks/granularity.py --compute 1e16 --parameters 2e7 --batch 128 --device cuda

Windows span about 256 characters of text, widths are chosen so that all networks have the same number of parameters (the head is the
embedding), and compute is 6 x parameters x tokens. Trainings are kept in --out and resumed, and measured ones in its rows.jsonl, so that
a later call with more --kinds makes those alone. The result is appended to benchmarks/history.jsonl; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dlm
from dlm.bench.rows import Rows
from dlm.evaluation import card, generative, order_cost, parallel_decoding
from dlm.evaluation.statistics import Mean
from dlm.language_model import LanguageModel
from dlm.sampling.diffusion.protocols import Rule
from dlm.sampling.diffusion.unmasking import Ancestral, TopScore
from dlm.text.tokenizer import Tokenizer
from dlm.train import data as reading
from dlm.train import recipes
from dlm.train.config import TrainConfig
from dlm.train.log import finished
from dlm.workflows.inputs import Text, masked_noise

KINDS = ("chars", "bytes", "bpe:256", "bpe:1024", "bpe:4096", "bpe:16384")
SPAN = 256  # characters of a window, about
HISTORY = Path(__file__).parent / "history.jsonl"
VAL_FRACTION = recipes.shakespeare_mask().val_fraction
RULES: dict[str, Rule] = {"ancestral": Ancestral(), "topk": TopScore()}


def design(kind: str, text: str, seed: int, args: argparse.Namespace) -> TrainConfig:
    """The run of one vocabulary: its window, width and steps."""
    base = replace(recipes.shakespeare_mask(), seed=seed)
    tokenizer = Tokenizer.make(kind, text)
    window = round(SPAN * len(tokenizer.encode_corpus([text])) / len(text) / 8) * 8
    network = base.network.with_(layers=args.layers, window=window, tied=True, head_dim=32, heads=4, width=2)

    def count(width: int) -> int:
        sized = network.with_(width=width, heads=4, head_dim=32, vocab_size=tokenizer.vocab_size + 1)
        with torch.device("meta"):
            return dlm.Transformer(sized).parameters_count()

    width = min(range(16, 513, 2), key=lambda w: abs(count(w) - args.parameters))
    steps = max(2, round(args.compute / (6 * count(width) * args.batch * SPAN)))
    batch = args.batch * SPAN // window  # the same tokens in every step
    config = replace(base, network=network.with_(width=width, heads=4, head_dim=32), tokenizer=kind, context=0, context_share=0.0)
    config = replace(config, steps=steps, batch=batch, warmup=min(100, steps // 4), eval_windows=64, bf16=args.bf16, compile=args.compile)
    return replace(config, eval_every=max(1, steps // 4), save_every=max(1, steps // 8))


def measure(lm: LanguageModel, judge: LanguageModel, args: argparse.Namespace) -> dict[str, Any]:
    """Bound, price and measured loss against characters a step (bits per character), and bits of generated text under the judge."""
    text = Text.read(lm, recipes.SHAKESPEARE, val_fraction=VAL_FRACTION, max_windows=args.windows)
    windows_WT, each = text.windows_WT, text.characters / text.windows_WT.numel()
    bound = dlm.evaluate(lm, recipes.SHAKESPEARE, val_fraction=VAL_FRACTION, max_windows=args.windows, passes=args.passes)
    noise = masked_noise(lm, "the curve is of masked tokens")
    few_WT = windows_WT[:: max(1, len(windows_WT) // args.curve_windows)]
    curve = order_cost.entropy_curve(noise, lm.predict, few_WT, passes=args.passes)
    h_WT = curve.every(curve.entropy_WK) / (each * math.log(2))

    def priced(count: int) -> tuple[float, float, float]:
        found_W = order_cost.price(h_WT, order_cost.equal_steps(lm.window, count)) / lm.window
        found = Mean.of(found_W)
        return lm.window * each / count, found.value, found.band95

    def measured(word: str, size: int) -> tuple[float, float, float]:
        found = parallel_decoding.curse(noise, lm.predict, few_WT, RULES[word], size)
        bits = found.bits_per_char(each)
        return lm.window * each / found.steps, bits.value, bits.band95

    sizes = sorted({min(lm.window, max(1, round(span / each))) for span in args.spans})
    record: dict[str, Any] = {"vocabulary": lm.tokenizer.vocab_size, "window": lm.window, "characters_per_token": each} | bound.figures()
    record["equal"] = [priced(2**k) for k in range(lm.window.bit_length()) if 2**k <= lm.window]
    record["measured"] = {word: [measured(word, size) for size in sizes] for word in RULES}
    record["texts"] = [generate(lm, judge, calls, args) for calls in args.calls if calls <= lm.window]
    return record


def generate(lm: LanguageModel, judge: LanguageModel, calls: int, args: argparse.Namespace) -> dict[str, float]:
    """Texts of one window in so many forward passes, in the judge's characters and cut to the shortest; `foreign`: the share it lacks."""
    made = [one.text for one in lm.generate([""] * args.samples, length=lm.window, steps=calls, sampler="ancestral")]
    known = set(judge.tokenizer.pieces().values())
    texts = ["".join(c for c in text if c in known) for text in made]
    length = max(8, min(judge.window, *map(len, texts)))
    rows = [judge.tokenizer.encode(text[:length]) for text in texts if len(text) >= length]
    samples_NT = torch.tensor(rows, device=args.device)
    bits = generative.judge_bits(judge.noise, judge.predict, samples_NT)
    found = {"bits": bits.value, "stderr": bits.stderr, "band95": bits.band95, "entropy": generative.unigram_entropy(samples_NT)}
    found |= {"distinct4": generative.distinct(samples_NT, 4), "foreign": 1 - sum(map(len, texts)) / sum(map(len, made))}
    return {"calls": calls, "length": length} | found


def told(row: dict[str, Any]) -> str:
    return f"<= {row['bits_per_char']:.3f} bits a character"


def over_seeds(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The lines that `show` draws as means over the training seeds, with their 95 % band; of one seed its own band."""

    def line(points: list[list[tuple[float, float, float]]]) -> list[tuple[float, float, float]]:
        if len(points) == 1:
            return points[0]
        means = [(at[0][0], Mean.of(torch.tensor([y for _, y, _ in at]))) for at in zip(*points, strict=True)]
        return [(x, mean.value, mean.band95) for x, mean in means]

    texts = [[(text["calls"], text["bits"], text["band95"]) for text in one["texts"]] for one in seeds]
    diverse = [[(text["calls"], text["distinct4"], 0.0) for text in one["texts"]] for one in seeds]
    bits = [[(0.0, one["bits_per_char"], 1.96 * one["stderr"] * one["bits_per_char"] / one["nats_per_token"])] for one in seeds]
    lines = {word: line([one["measured"][word] for one in seeds]) for word in RULES} | {"equal": line([one["equal"] for one in seeds])}
    return lines | {
        "bits": line(texts),
        "distinct4": line(diverse),
        "bound": line(bits)[0],
        "characters_per_token": seeds[0]["characters_per_token"],
    }


def show(means: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """The table, and the picture if asked for."""
    spans = [f"lost at {span}" for span in args.spans]
    forwards = [f"{calls} calls" for calls in args.calls]
    table = Table("tokens", "chars/token", "bits/char", *spans, "at all", *forwards, "distinct-4", box=None)
    for kind, one in means.items():
        x, y, bands = zip(*((math.log2(x), y, band) for x, y, band in reversed(one["equal"])), strict=True)
        lost = [
            f"{between(math.log2(span), x, y):.3f} +- {between(math.log2(span), x, bands):.3f}" if span <= 2 ** x[-1] else ""
            for span in args.spans
        ]
        judged = {calls: f"{bits:.2f} +- {band:.2f}" for calls, bits, band in one["bits"]}
        bits = f"<= {one['bound'][1]:.3f} +- {one['bound'][2]:.3f}"
        whole, diverse = f"{y[-1]:.2f} +- {bands[-1]:.2f}", f"{one['distinct4'][-1][1]:.2f}"
        each = f"{one['characters_per_token']:.2f}"
        table.add_row(kind, each, bits, *lost, whole, *(judged.get(calls, "") for calls in args.calls), diverse)
    console = Console(width=200)
    console.print(table)
    over = f"{len(args.seeds)} training seeds" if len(args.seeds) > 1 else "windows and texts of one training seed"
    console.print(
        "lost: bits per character, at so many characters a step and at all of a text; calls: bits per character of text in so many "
        f"forward passes; distinct-4: in the most of them; +- 95 % over {over}"
    )
    if args.plot:
        from dlm.viz.plots import panels_plot

        titles = {
            "equal": ("bits per character lost, random positions", "characters drawn at once"),
            "topk": ("the same, measured with topk", "characters drawn at once"),
            "bits": ("bits per character under the judge", "forward passes for a text"),
            "distinct4": ("share of 4-grams that are different", "forward passes for a text"),
        }
        panels_plot([(*titles[name], {kind: one[name] for kind, one in means.items()}) for name in titles], args.plot)


def between(at: float, x: tuple[float, ...], y: tuple[float, ...]) -> float:
    """On the line through the points, x ascending; the first value before it."""
    i = max(1, min(len(x) - 1, sum(value < at for value in x)))
    return y[0] if at <= x[0] else y[i - 1] + (y[i] - y[i - 1]) * (at - x[i - 1]) / (x[i] - x[i - 1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--compute", type=float, default=2e13, help="FLOPs of one run")
    parser.add_argument("--parameters", type=float, default=1e6)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens a step")
    parser.add_argument("--out", type=Path, default=Path("runs/granularity"))
    parser.add_argument("--train-only", action="store_true", help="leave the measurement to a later call")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, on machines that multiply it")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--windows", type=int, default=400, help="for the bound")
    parser.add_argument("--curve-windows", type=int, default=16, help="to measure the loss of parallel decoding on")
    parser.add_argument("--spans", type=int, nargs="+", default=[4, 16, 64], help="characters a step at which the loss is shown")
    parser.add_argument("--calls", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="forward passes for a text")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--judge", default="shakespeare-ar", help="an autoregressive model of characters")
    parser.add_argument("--plot", type=Path, help="write the curves as .png, .svg or .pdf")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two vocabularies, tiny networks: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.compute, args.parameters, args.kinds, args.out = 2e9, 5e4, ["chars", "bpe:256"], args.out / "quick"
        args.layers = 2
        args.seeds = [0, 1]
        args.passes, args.windows, args.curve_windows, args.samples, args.spans, args.calls = 2, 8, 2, 4, [16], [4, 16]
    return args


def trained(kind: str, text: str, seed: int, args: argparse.Namespace) -> Path:
    """The run of one vocabulary, trained now or as far as it was not."""
    config = design(kind, text, seed, args)
    out: Path = args.out / f"{kind.replace(':', '-')}-{seed}"
    about = f"{kind}, seed {seed}: window {config.network.window}, width {config.network.width}, {config.steps} steps"
    Console(stderr=True).print(about, highlight=False)
    if not finished(out, config.steps):
        dlm.fit(config, out, resume=(out / "training.safetensors").is_file())
    return out


def main() -> None:
    args = arguments()
    text = "\n".join(reading.read(recipes.SHAKESPEARE))
    runs = [(kind, seed) for seed in args.seeds for kind in args.kinds]
    if args.train_only:
        for kind, seed in runs:
            trained(kind, text, seed, args)
        return
    judge, found = dlm.load(args.judge, device=args.device), {kind: list[dict[str, Any]]() for kind in args.kinds}
    unset = {"kinds", "seeds", "out", "plot", "train_only", "device", "quick"}
    rows, settings = Rows(args.out / "rows.jsonl"), [f"{name}={value}" for name, value in vars(args).items() if name not in unset]

    def measured(kind: str, seed: int) -> dict[str, Any]:
        return measure(dlm.load(str(trained(kind, text, seed, args)), device=args.device), judge, args)

    for kind, seed in runs:
        found[kind].append(rows.row(kind, settings, seed, measure=partial(measured, kind, seed), told=told))
    means = {kind: over_seeds(seeds) for kind, seeds in found.items()}
    show(means, args)
    shown = {name: value for name, value in vars(args).items() if name not in ("out", "plot", "train_only", "device", "quick")}
    data = {"source": recipes.SHAKESPEARE, "split": "val"}
    line = {"benchmark": "granularity"} | card.make(means, device=args.device, dtype="float32", seed=0, settings=shown, data=data)
    if not args.quick:
        with HISTORY.open("a") as file:
            file.write(card.dumps(line) + "\n")
    print(card.dumps(line))


if __name__ == "__main__":
    main()
