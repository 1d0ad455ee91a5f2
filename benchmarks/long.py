"""Memory and time against the length of a text: block diffusion with and without its KV cache, sliding windows, the baseline.

    python benchmarks/long.py                          # 1k to 16k characters, each in a process of its own

Peak memory is that of the process less its memory after loading. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

import dlm
from dlm.evaluation import card

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "block diffusion, exact cache": ("shakespeare-block", {}),
    "block diffusion, no cache": ("shakespeare-block", {"cache": False}),
    "sliding windows": ("shakespeare-mask", {}),
    "autoregressive, cache": ("shakespeare-ar", {}),
}


def one(method: str, length: int, steps: int) -> dict[str, Any]:
    """Write one text; seconds, forward passes and MiB above those of loading."""
    name, options = METHODS[method]
    model = dlm.load(name)
    options = options | ({"steps": steps} if model.is_diffusion else {})
    model.generate(length=model.window, seed=1, **options)  # the first call allocates what every later one uses
    before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    result = model.generate(length=length, seed=0, **options)
    seconds = time.perf_counter() - clock
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"method": method, "length": length, "seconds": seconds, "calls": result.forwards, "mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--steps", type=int, default=32, help="for each window")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "LENGTH"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="short texts: does it run?")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]), args.steps)))
        return
    if args.quick:
        args.lengths, args.steps = [300], 4
    console, rows = Console(stderr=True), []
    table = Table("method", "characters", "forward passes", "seconds", "characters/s", "MiB more", box=None)
    for method in args.methods:
        for length in args.lengths:
            console.print(f"{method}, {length:,} characters", highlight=False)
            command = [sys.executable, __file__, "--steps", str(args.steps), "--one", method, str(length)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            rows.append(row)
            figures = f"{row['calls']:,}", f"{row['seconds']:.1f}", f"{length / row['seconds']:,.0f}", f"{row['mib']:.1f}"
            table.add_row(method, f"{length:,}", *figures)
    Console().print(table)
    print(card.dumps(card.make({"rows": rows}, device="cpu", dtype="float32", seed=0, settings=vars(args), data={})))


if __name__ == "__main__":
    main()
