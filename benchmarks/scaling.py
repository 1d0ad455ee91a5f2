"""Masked against uniform noise at three sizes and one compute: the bound of each, trained from noise.

    python benchmarks/scaling.py                       # half an hour of one core
    python benchmarks/scaling.py --compute 1e15 --batch 64 --sizes 6x192 6x384 12x512   # a GPU: the same table further on

compute is 6 x parameters x training tokens, so that a smaller model sees more text. Runs are kept in --out and resumed. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import dlm
from dlm.evaluation import card
from dlm.train import recipes
from dlm.train.log import finished

HEAD = 32  # channels a head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compute", type=float, default=6.5e12, help="FLOPs of one run")
    parser.add_argument("--sizes", nargs="+", default=["3x64", "4x96", "5x128"], help="layers x width")
    parser.add_argument("--noise", nargs="+", default=["masked", "uniform"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--train-only", action="store_true", help="leave the table to a later call")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few steps of one small size: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.compute, args.sizes, args.passes, args.out = 2e10, ["1x32"], 2, args.out / "quick"
    base = recipes.shakespeare_mask()
    console, rows = Console(stderr=True), []
    for size in args.sizes:
        layers, width = (int(n) for n in size.split("x"))
        network = base.network.with_(layers=layers, width=width, heads=width // HEAD)
        parameters = dlm.Transformer(network.with_(vocab_size=66)).parameters_count()
        steps = max(2, round(args.compute / (6 * parameters * args.batch * network.window)))
        for noise in args.noise:
            often = max(1, steps // 4)
            config = replace(base, network=network, noise=noise, steps=steps, batch=args.batch, eval_every=often, save_every=often)
            config = replace(config, warmup=min(100, steps // 4), eval_windows=64, compile=args.compile)
            out = args.out / f"{noise}-{size}"
            console.print(f"{noise} {size}: {parameters:,} parameters, {steps} steps", highlight=False)
            if not finished(out, steps):
                dlm.fit(config, out, resume=(out / "training.safetensors").is_file())
            if args.train_only:
                continue
            settings = {"val_fraction": base.val_fraction, "max_windows": 64 if args.quick else None, "passes": args.passes}
            bound = dlm.evaluate(out, base.data, **settings)
            rows.append({"noise": noise, "size": size, "parameters": parameters, "steps": steps} | bound.figures())
    if args.train_only:
        return
    table = Table("size", "parameters", "steps", *args.noise, "gap", box=None)
    for size in args.sizes:
        mine = [row for row in rows if row["size"] == size]
        nats = [row["nats_per_token"] for row in mine]
        cells = [f"<= {row['nats_per_token']:.3f} +- {row['stderr']:.3f}" for row in mine]
        gap = f"{100 * (nats[-1] / nats[0] - 1):+.1f} %" if len(nats) > 1 else ""
        table.add_row(size, f"{mine[0]['parameters']:,}", str(mine[0]["steps"]), *cells, gap)
    Console().print(table)
    settings = {"compute": args.compute, "batch": args.batch, "passes": args.passes}
    print(card.dumps(card.make({"rows": rows}, device="cpu", dtype="float32", seed=0, settings=settings, data={"source": base.data})))


if __name__ == "__main__":
    main()
