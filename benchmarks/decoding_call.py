"""Where the time of a decoding forward pass goes: matrix products, attention, other operations, and their overhead.

    python benchmarks/decoding_call.py --base smollm2-135m --modes "float32;int8;int4;int4,compile" --positions 1,4,16

A forward pass reads so many positions after a text of 128. Products: time in matrix products, and weights that they read in a second;
rest: all other operations and the overhead of each. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dlm
from dlm.evaluation import card
from dlm.inference.quantized_linear import Int4Linear

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "mkldnn::_linear_pointwise",
    "aten::_weight_int8pack_mm",
    "aten::_weight_int4pack_mm_for_cpu",
)
ATTENTION = ("aten::_scaled_dot_product", "aten::scaled_dot_product")


def one_call(network: Any, positions: int, held: int) -> Any:
    z_BQ = torch.arange(5, 5 + positions)[None]
    pos_BQ, own_BQQ = held + torch.arange(positions)[None], torch.ones(1, positions, positions, dtype=torch.bool).tril()
    cache = network.ragged_cache(1, held + positions)

    def call() -> None:
        cache.trim(torch.zeros(1, dtype=torch.long))
        cache.advance(held)
        network(z_BQ, pos_BQ=pos_BQ, own_BQQ=own_BQQ, cache=cache)

    return call


def shares(call: Any, calls: int = 5) -> tuple[float, float, int]:
    """(share of the time in products, in attention, operations) of a call under the profiler."""
    with torch.profiler.profile() as profile:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        whole = 1e6 * (time.perf_counter() - begin)
    products = attention = 0.0
    count = 0
    for event in profile.events():
        name, spent = str(event.name), event.self_cpu_time_total
        count += name.startswith(("aten::", "mkldnn::"))
        products += spent * (name in PRODUCTS)
        attention += spent * name.startswith(ATTENTION)
    return products / whole, attention / whole, count // calls


def megabytes(network: Any) -> float:
    """Of the weights that a call multiplies with, as it reads them for few positions."""
    layers = [m for m in network.modules() if hasattr(m, "out_features")]
    read = [
        tensor for m in layers for tensor in ((m.packed, m.scale_GO2) if isinstance(m, Int4Linear) else (m.weight,)) if tensor is not None
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in read) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--modes", default="float32;int8;int4;int4,compile", help="dtype, or dtype,compile; semicolons between")
    parser.add_argument("--positions", default="1,4,16")
    parser.add_argument("--held", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="the bundled base: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.base, args.modes, args.positions, args.repeats = "shakespeare-ar", "float32;int8;int4", "1,4", 3
    rows: list[dict[str, Any]] = []
    for mode in args.modes.split(";"):
        dtype, _, how = mode.partition(",")
        lm = dlm.load(args.base, dtype=dtype, compile=how == "compile")
        network = lm.network
        held = min(args.held, lm.window // 2)
        for positions in map(int, args.positions.split(",")):
            call, taken = one_call(network, positions, held), []
            for _ in range(args.repeats + 3):
                begin = time.perf_counter()
                call()
                taken.append(1e3 * (time.perf_counter() - begin))
            best, (products, attention, count) = min(taken[3:]), shares(call)
            row = {"mode": mode, "positions": positions, "ms": best, "products_ms": products * best, "attention_ms": attention * best}
            rows.append(row | {"operations": count, "weights_mb": megabytes(network)})
    table = Table(
        "mode", "positions", "ms a call", "products", "attention", "rest", "operations", "GB of weights a second in products", box=None
    )
    for row in rows:
        rest = row["ms"] - row["products_ms"] - row["attention_ms"]
        speed = row["weights_mb"] / row["products_ms"] if row["products_ms"] else 0.0
        times = (f"{row[key]:.1f}" for key in ("ms", "products_ms", "attention_ms"))
        table.add_row(row["mode"], str(row["positions"]), *times, f"{rest:.1f}", str(row["operations"]), f"{speed:.1f}")
    Console(width=140).print(table)
    figures = {"rows": rows}
    print(card.dumps(card.make(figures, device="cpu", dtype=args.modes, seed=0, settings=vars(args), data={"source": "none"})))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
