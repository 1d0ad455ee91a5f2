"""Held-out chorales: a masked model, its autoregressive twin and counts of contexts, in bits a sixteenth of a voice.

    dlm train chorales --data chorales:WHEEL && dlm train chorales-ar --data chorales:WHEEL
    python benchmarks/chorales.py --scores WHEEL

Counts are interpolated: p_k = (n + a p_(k-1)) / (N + a), contexts of the last k tokens and the voice, over every transposition of the
training part. The order and `a` that are best on the validation part stand in the table, which favours them. Contexts are longer than those
of `dlm.evaluation.counts`, and are found by a hash. Errors are over windows of 64 sixteenths. The result is appended to
benchmarks/history.jsonl; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dlm.evaluation.card import dumps
from dlm.evaluation.statistics import standard_error
from dlm.language_model import load
from dlm.noise import loss
from dlm.train import chorales

HISTORY = Path(__file__).parent / "history.jsonl"
ORDERS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32)
PULLS = (1.0, 4.0, 16.0)
SIZE, VOICES = len(chorales.SYMBOLS), len(chorales.VOICES)
START = SIZE  # in place of tokens before a piece


def joined(key_N: np.ndarray, token_N: np.ndarray) -> np.ndarray:
    """A number for each pair, mixed so that sums of small numbers do not coincide."""
    mixed_N: np.ndarray = key_N * np.uint64(0x9E3779B97F4A7C15) + token_N + np.uint64(1)
    mixed_N ^= mixed_N >> np.uint64(29)
    mixed_N *= np.uint64(0xD6E8FEB86659FD93)
    return mixed_N


def contexts(piece_N: np.ndarray, order: int) -> np.ndarray:
    """A number for the voice and the last `order` tokens of each position; equal for equal contexts but for chance, 2^-64 a pair."""
    key_N = (np.arange(len(piece_N)) % VOICES).astype(np.uint64)
    padded = np.concatenate([np.full(order, START), piece_N]).astype(np.uint64)
    for back in range(1, order + 1):
        key_N = joined(key_N, padded[order - back : len(padded) - back])
    return key_N


def looked_up(keys_M: np.ndarray, counts_M: np.ndarray, wanted_N: np.ndarray) -> np.ndarray:
    """The count of each wanted key, 0 for those that are not there. keys_M is sorted."""
    at_N = np.minimum(np.searchsorted(keys_M, wanted_N), len(keys_M) - 1)
    return np.where(keys_M[at_N] == wanted_N, counts_M[at_N], 0)


def counted(train: list[np.ndarray], val: list[np.ndarray]) -> dict[tuple[int, float], np.ndarray]:
    """By order and pull, the nats of every validation token."""
    token_N = np.concatenate(val).astype(np.uint64)
    p = {pull: np.full(len(token_N), 1 / SIZE) for pull in PULLS}
    found = {}
    for order in ORDERS:
        seen, asked = (np.concatenate([contexts(piece, order) for piece in part]) for part in (train, val))
        joint, asked_joint = (joined(key, np.concatenate(part).astype(np.uint64)) for key, part in ((seen, train), (asked, val)))
        whole_N, joint_N = (
            looked_up(*np.unique(keys, return_counts=True), wanted) for keys, wanted in ((seen, asked), (joint, asked_joint))
        )
        for pull in PULLS:
            p[pull] = (joint_N + pull * p[pull]) / (whole_N + pull)
            found[order, pull] = -np.log(p[pull])
    return found


def shifted(piece_SV: Tensor) -> list[np.ndarray]:
    """Every transposition that the training draws from."""
    sounds = piece_SV >= chorales.FIRST
    top = SIZE - 1
    low, high = piece_SV[sounds].min().item(), piece_SV[sounds].max().item()
    shifts = range(max(-5, chorales.FIRST - int(low)), min(6, top - int(high)) + 1)
    return [torch.where(sounds, piece_SV + shift, piece_SV).flatten().numpy() for shift in shifts]


def masked(name: str, windows_WT: Tensor, given: bool, passes: int) -> Tensor:
    """The bound of each window, nats a predicted token. given: under its soprano."""
    model, rng = load(name), torch.Generator().manual_seed(0)
    free_WT = (torch.arange(windows_WT.shape[1]) % VOICES >= given).expand_as(windows_WT)
    with torch.no_grad():
        found = [loss.any_order(model.noise, model.predict, windows_WT, free_WT, rng) for _ in range(passes)]  # type: ignore[arg-type]
    return torch.stack(found).mean(0) / free_WT.sum(-1)


def autoregressive(name: str, windows_WT: Tensor) -> Tensor:
    model = load(name)
    with torch.no_grad():
        return (
            loss.autoregressive(model.noise, model.predict, windows_WT, torch.ones_like(windows_WT, dtype=torch.bool)) / windows_WT.shape[1]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", required=True, help="a wheel of music21, or a folder of scores")
    parser.add_argument("--model", default="runs/chorales")
    parser.add_argument("--twin", default="runs/chorales-ar")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--history", type=Path, default=HISTORY)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pieces = chorales.read(args.scores)
    train, val = (chorales.split(pieces, part, 0.1) for part in ("train", "val"))
    windows_WT = chorales.ChoraleStream.of(val, chorales.SIXTEENTHS * VOICES, "validation part").windows()
    length = windows_WT.shape[1]
    whole = [piece.flatten()[: piece.numel() // length * length].numpy() for piece in val]
    counts = counted([made for piece in train for made in shifted(piece)], whole)
    best = min(counts, key=lambda setting: counts[setting].mean())
    measures: dict[str, Callable[[], Tensor]] = {
        f"counts of order {best[0]}": lambda: torch.from_numpy(counts[best]).view(-1, length).mean(-1),
        "autoregressive": lambda: autoregressive(args.twin, windows_WT),
        "masked": lambda: masked(args.model, windows_WT, False, args.passes),
        "masked, three voices under the soprano": lambda: masked(args.model, windows_WT, True, args.passes),
    }
    table, rows = Table("model", "bits a sixteenth", "error", box=None), []
    for name, measure in measures.items():
        bits_W = measure().double() / math.log(2)
        row: dict[str, Any] = {"model": name, "bits": bits_W.mean().item(), "stderr": standard_error(bits_W).item()}
        table.add_row(name, f"{'<= ' if name.startswith('masked') else ''}{row['bits']:.3f}", f"{row['stderr']:.3f}")
        rows.append(row)
    Console(width=100).print(f"{len(windows_WT)} windows of {len(val)} chorales, {len(train)} to train", table)
    by_order = {str(order): min(counts[order, pull].mean() for pull in PULLS) / math.log(2) for order in ORDERS}
    line = {"benchmark": "chorales", "machine": platform.processor() or platform.machine(), "windows": len(windows_WT), "rows": rows}
    line |= {"counts_bits": by_order, "pull": best[1]}
    with args.history.open("a") as file:
        file.write(dumps(line) + "\n")
    print(dumps(line))


if __name__ == "__main__":
    main()
