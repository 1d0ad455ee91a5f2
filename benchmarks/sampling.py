"""Characters a second of a diffusion model on this machine, beside plain loops over the same network.

    python benchmarks/sampling.py

plain threshold: the loop of tiny-diffusion (v2) in a few lines: full logits of the window, every mask whose three likeliest tokens have
95 % together is drawn from those at temperature 0.8, else the likeliest one. plain ancestral: 64 equal steps, each mask revealed with the
probability of the step, every position drawn. Both call the network as it was trained. Ours: the samplers of the same kind over the
network that `dlm.load` prepares, one thread. Runs take turns; CPU seconds say more than seconds where other programs run. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dlm

STEPS, TOP, THRESHOLD, TEMPERATURE = 64, 3, 0.95, 0.8
Loop = Callable[[int], tuple[Tensor, int]]  # seed -> (ids (T,), forward passes)


def plain_threshold(network: Any, prompt: Tensor, window: int, mask_id: int) -> Loop:
    """tiny-diffusion's."""

    def write(seed: int) -> tuple[Tensor, int]:
        torch.manual_seed(seed)
        z_1T, passes = torch.full((1, window), mask_id), 0
        z_1T[0, : len(prompt)] = prompt
        while bool((masked_1T := z_1T == mask_id).any()):
            logits = network(z_1T) / TEMPERATURE
            logits[..., mask_id] = -torch.inf
            best, token = logits.softmax(-1).topk(TOP, -1)
            sure_1T = best.sum(-1).masked_fill(~masked_1T, -1.0)
            write_1T = sure_1T >= THRESHOLD
            if not bool(write_1T.any()):
                write_1T = sure_1T == sure_1T.max()
            drawn_1T = token[0].gather(-1, torch.multinomial(best[0], 1)).squeeze(-1)[None]
            z_1T, passes = torch.where(write_1T, drawn_1T, z_1T), passes + 1
        return z_1T[0], passes

    return write


def plain_ancestral(network: Any, prompt: Tensor, window: int, mask_id: int) -> Loop:
    """MDLM's, without a cache of anything."""

    def write(seed: int) -> tuple[Tensor, int]:
        torch.manual_seed(seed)
        z_1T = torch.full((1, window), mask_id)
        z_1T[0, : len(prompt)] = prompt
        for left in range(STEPS, 0, -1):
            logits = network(z_1T)
            logits[..., mask_id] = -torch.inf
            drawn_1T = torch.multinomial(logits[0].softmax(-1), 1).squeeze(-1)[None]
            reveal_1T = (torch.rand(1, window) < 1 / left) & (z_1T == mask_id)
            z_1T = torch.where(reveal_1T, drawn_1T, z_1T)
        return z_1T[0], STEPS

    return write


def ours(model: dlm.LanguageModel, prompt: str, **options: Any) -> Loop:
    def write(seed: int) -> tuple[Tensor, int]:
        made = model.generate(prompt, seed=seed, **options)
        return made.trajectory.current_BT[0], made.forwards

    return write


def timed(loop: Loop, seed: int, prompt: int) -> dict[str, float]:
    """Characters, forward passes, seconds and CPU seconds of one text."""
    begin, cpu = time.perf_counter(), time.process_time()
    ids, passes = loop(seed)
    return {
        "characters": len(ids) - prompt,
        "passes": passes,
        "seconds": time.perf_counter() - begin,
        "cpu": time.process_time() - cpu,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="shakespeare-mask", help="a masked model of characters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one round of a light model: does it run?")
    args = parser.parse_args()
    name, rounds = ("shakespeare-mask-1", 1) if args.quick else (args.model, args.rounds)
    torch.set_num_threads(args.threads)
    model, prompt = dlm.load(name), "ROMEO:"
    ids = torch.tensor(model.tokenizer.encode(prompt))
    where = dlm.LanguageModel.from_pretrained(name).network, ids, model.window, model.tokenizer.mask_id
    loops: dict[str, Loop] = {
        "plain threshold (tiny-diffusion)": plain_threshold(*where),
        "confidence:0.9": ours(model, prompt, sampler="confidence:0.9", temperature=TEMPERATURE),
        "plain ancestral, 64 steps": plain_ancestral(*where),
        "ancestral, 64 steps": ours(model, prompt, sampler="ancestral", steps=STEPS),
    }
    for dtype, compiled in [("bfloat16", False), ("int8", False), ("float32", True), ("bfloat16", True)] if not args.quick else ():
        near, how = dlm.load(name, dtype=dtype, compile=compiled), f"{dtype}{', compiled' * compiled}"
        loops[f"ancestral, 64 steps, {how}"] = ours(near, prompt, sampler="ancestral", steps=STEPS)
        loops[f"confidence:0.9, {how}"] = ours(near, prompt, sampler="confidence:0.9", temperature=TEMPERATURE)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in loops}
    for seed in range(-1, rounds):  # the first is a warm-up
        for kind, loop in loops.items():
            found[kind] += [timed(loop, max(seed, 0), len(ids))] * (seed >= 0)
    table, records = Table("loop", "forward passes", "CPU ms a pass", "characters a second", "a CPU second"), []
    for kind, runs in found.items():
        total = {name: sum(run[name] for run in runs) for name in runs[0]}
        record = {
            "loop": kind,
            "passes": total["passes"] / rounds,
            "cpu_ms_a_pass": 1e3 * total["cpu"] / total["passes"],
            "characters_a_second": total["characters"] / total["seconds"],
            "characters_a_cpu_second": total["characters"] / total["cpu"],
        }
        records.append(record)
        table.add_row(kind, *(f"{value:.1f}" for value in list(record.values())[1:]))
    Console().print(table)
    print(json.dumps({"benchmark": "sampling", "model": name, "threads": args.threads, "rounds": rounds, "runs": records}))


if __name__ == "__main__":
    main()
