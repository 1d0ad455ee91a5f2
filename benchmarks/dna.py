"""A genome under masked, uniform, block and autoregressive models of equal compute, beside counts of k-mers; and what they write.

    python benchmarks/dna.py tuberculosis.fa --plot dna.png         # train four models, measure, sample
    python benchmarks/dna.py tuberculosis.fa --kinds                # the count models alone: a minute
    python benchmarks/dna.py --quick                                # does it run? on a random sequence

Training is the recipe `dna` on the first nine tenths; all figures are of the last tenth. Block diffusion reads two texts a step and
takes fewer steps, so that all runs take about the same CPU seconds, which the table shows. Count models interpolate their orders and count
both strands. Errors are those of the Monte-Carlo estimate, 0 where the figure is exact. Samples and stretches of the held-out
part have one number and length; each is compared with the rest of that part. What is made is kept in --runs, so that an interrupted
call goes on. The result is appended to benchmarks/history.jsonl; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import dlm
from dlm.evaluation import genomes
from dlm.evaluation.card import dumps
from dlm.evaluation.counts import CountModel
from dlm.evaluation.statistics import Mean
from dlm.language_model import LanguageModel
from dlm.train import dna, recipes
from dlm.viz.plots import Line, panels_plot
from dlm.workflows.evaluate import evaluate
from dlm.workflows.fit import fit

HISTORY = Path(__file__).parent / "history.jsonl"
KINDS = {
    "masked": [],
    "uniform": ["noise=uniform"],
    "block": ["attention=block_causal", "block_length=16"],
    "autoregressive": ["attention=causal", "objective=autoregressive"],
}
BLOCK_SHARE = 0.36  # of the steps: each takes 2.8 times as long
SAMPLERS = {"masked": "first-hitting", "uniform": "ancestral", "block": "first-hitting", "autoregressive": "autoregressive"}
SIZES = (3, 4, 5, 6)  # of k-mers
LONE = 32  # bases from one lone mask to the next
SPAN = 96  # bases of a power spectrum
CODONS = range(0, 121, 10)
QUICK = ["steps=4", "warmup=1", "layers=1", "width=16", "heads=2", "window=64", "context=16", "eval_windows=4", "block_length=16"]
Rows = dict[str, np.ndarray]


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds, made where there is none."""
    if not path.is_file():
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(found))
    made: dict[str, Any] = json.loads(path.read_text())
    return made


def trained(kind: str, genome: str, out: Path, settings: list[str]) -> dict[str, Any]:
    """Train into `out`: CPU seconds and steps."""
    config = replace(recipes.dna(), data=genome).with_settings([*settings, *KINDS[kind]])
    config = replace(config, steps=max(2, round(config.steps * (BLOCK_SHARE if kind == "block" else 1))))
    begun = time.process_time()
    fit(config, out)
    return {"seconds": round(time.process_time() - begun, 1), "steps": config.steps}


def bound(lm: LanguageModel, genome: str, passes: int, windows: int | None) -> dict[str, Any]:
    """Bits a base of the last tenth, and of lone masks for a model that sees both sides."""
    found = evaluate(lm, genome, passes=passes, max_windows=windows)
    made = {"bits": found.bits_per_char, "stderr": found.stderr / math.log(2), "is_bound": found.is_bound}
    if lm.is_diffusion and lm.kind == "masked" and not lm.is_causal:
        made |= lone(lm, dna.find(genome).stream("val", lm.window, 0.1).windows(windows))
    return made


@torch.no_grad()
def lone(lm: LanguageModel, windows_WT: torch.Tensor) -> dict[str, float]:
    """Bits of bases that are masked alone, each with what lies within LONE bases on both sides of it visible, and the share that is
    right when the likeliest is taken."""
    at = torch.arange(LONE // 2, lm.window, LONE)
    bits, right = [], []
    for x_BT in windows_WT.split(32):
        z_BT = x_BT.index_fill(1, at, lm.noise.mask_id)
        t_B = torch.full((len(x_BT),), 1 / LONE, dtype=torch.float64)
        logp_BTV = lm.noise.log_probs(lm.predict(z_BT, t_B), z_BT, t_B)
        bits.append(-logp_BTV.gather(-1, x_BT[..., None])[:, at, 0].mean(1) / math.log(2))
        right.append((logp_BTV.argmax(-1) == x_BT)[:, at].double().mean(1))
    bits_W, right_W = Mean.of(torch.cat(bits)), Mean.of(torch.cat(right))
    return {"lone_bits": bits_W.value, "lone_stderr": bits_W.stderr, "lone_right": right_W.value, "lone_right_stderr": right_W.stderr}


def written(lm: LanguageModel, kind: str, rows: int, length: int, steps: int) -> np.ndarray:
    """Samples, int64 (rows, length)."""
    options: dict[str, Any] = {} if kind == "autoregressive" else {"steps": steps}
    made = lm.generate([""] * rows, length=length, sampler=SAMPLERS[kind], temperature=1.0, seed=0, **options)
    return made[0].trajectory.current_BT.numpy()


def counted(fasta: dna.Fasta, order: int, window: int, windows: int | None) -> tuple[CountModel, list[float]]:
    """Counts of the first nine tenths on both strands, and for every order bits a base of the windows that models are measured on. Their
    contexts reach back before the window, where a model begins anew."""
    runs, held = parts(fasta.stream("train", 1, 0.1)), fasta.stream("val", window, 0.1)
    model = CountModel.of([*runs, *(3 - run[::-1] for run in runs)], order, len(dna.BASES))
    bits_KN = -np.log2(np.concatenate([model.probabilities(run) for run in parts(held)], 1))
    places_WT = replace(held, tokens_N=np.arange(len(held.tokens_N))).windows(windows)
    return model, bits_KN[:, places_WT.flatten().numpy()].mean(1).tolist()


def parts(stream: dna.BaseStream) -> list[np.ndarray]:
    """Its runs."""
    return np.split(stream.tokens_N, np.cumsum(stream.lengths)[:-1])


def stretches(fasta: dna.Fasta, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The held-out part without a sample of it, and the sample: windows side by side, int64 (W - rows, length) and (rows, length)."""
    windows_WT = fasta.stream("val", length, 0.1).windows().numpy()
    if len(windows_WT) < 2 * rows:
        raise SystemExit(f"the last tenth of {fasta.path} has {len(windows_WT)} windows of {length}: ask for fewer --samples")
    taken = np.linspace(0, len(windows_WT) - 1, rows).round().astype(int)
    return np.delete(windows_WT, taken, 0), windows_WT[taken]


def quality(rows_RT: np.ndarray, real_RT: np.ndarray) -> dict[str, Any]:
    """Divergence of spectra from the real ones, power at period 3, and the longest reading frame of a row in codons."""
    both = [np.concatenate([genomes.frame_lengths(strand) for strand in (row, 3 - row[::-1])]) for row in rows_RT]
    longest = Mean.of(torch.tensor([frames.max() for frames in both], dtype=torch.float64))
    rhythm = Mean.of(torch.from_numpy(genomes.rhythm(rows_RT)))
    every, spans_RT = np.concatenate(both), rows_RT[:, : rows_RT.shape[1] // SPAN * SPAN].reshape(-1, SPAN)
    return {
        "divergence": {str(k): genomes.divergence(rows_RT, real_RT, k) for k in SIZES},
        "gc": float(np.isin(rows_RT, (1, 2)).mean()),
        "rhythm": rhythm.value,
        "rhythm_band95": rhythm.band95,
        "longest": longest.value,
        "longest_band95": longest.band95,
        "power": genomes.powers(spans_RT).mean(0).tolist(),
        "frames": [float((every >= codons).mean()) for codons in CODONS],
    }


def plot(bits: dict[str, Any], counts: list[float], found: dict[str, dict[str, Any]], path: Path) -> None:
    """Bits a base, divergence of spectra, power by frequency, and lengths of reading frames."""
    last = len(counts) - 1
    levels: dict[str, Line] = {"counts": [(float(k), value, 0.0) for k, value in enumerate(counts)]}
    levels |= {kind: [(x, row["bits"], 1.96 * row["stderr"]) for x in (0.0, float(last))] for kind, row in bits.items()}
    spectra: dict[str, Line] = {name: [(k, one["divergence"][str(k)], 0.0) for k in SIZES] for name, one in found.items()}
    power: dict[str, Line] = {name: [((i + 1) / SPAN, p, 0.0) for i, p in enumerate(one["power"])] for name, one in found.items()}
    frames: dict[str, Line] = {
        name: [(n, share, 0.0) for n, share in zip(CODONS, one["frames"], strict=True)] for name, one in found.items()
    }
    panels = [
        ("bits a base, last tenth", "order of the counts", levels),
        ("divergence of k-mer spectra from the genome's, bits", "k", spectra),
        ("power over its mean", "cycles a base: codons are 1/3", power),
        ("share of reading frames at least so long", "codons", frames),
    ]
    panels_plot(panels, path, doubling=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("genome", nargs="?", default="tuberculosis.fa", help="a FASTA file")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--order", type=int, default=12, help="highest order of the counts")
    parser.add_argument("--passes", type=int, default=3, help="Monte-Carlo passes over the held-out part")
    parser.add_argument("--windows", type=int, help="of the held-out part at most, spread over it; default: all")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=768, help="bases of a sample")
    parser.add_argument("--steps", type=int, default=128, help="of sampling, a window")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="of training, for every run")
    parser.add_argument("--runs", type=Path, default=Path("runs/dna"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.quick:
        measure(args)
        return
    args.order, args.passes, args.samples, args.length, args.steps, args.settings = 4, 2, 4, 96, 8, [*QUICK, *args.settings]
    with tempfile.TemporaryDirectory() as folder:
        args.genome, args.runs = str(Path(folder, "random.fa")), Path(folder)
        letters = np.random.default_rng(0).choice(list(dna.BASES), 12_000, p=(0.3, 0.2, 0.2, 0.3))
        Path(args.genome).write_text(">random\n" + "".join(letters) + "\n")
        measure(args)


def measure(args: argparse.Namespace) -> None:
    fasta = dna.find(args.genome)
    window = replace(recipes.dna(), data=args.genome).with_settings(args.settings).network.window
    model, counts = counted(fasta, args.order, window, args.windows)
    best = min(range(len(counts)), key=lambda k: counts[k])
    print("counts: " + ", ".join(f"order {k} {bits:.4f}" for k, bits in enumerate(counts)), flush=True)
    held, beside = stretches(fasta, args.samples, args.length)
    rng = np.random.default_rng(0)
    made: Rows = {"the genome itself": beside}
    rows: dict[str, dict[str, Any]] = {}
    for kind in args.kinds:
        out = args.runs / kind
        cost = kept(out / "cost.json", lambda kind=kind, out=out: trained(kind, args.genome, out, args.settings))  # type: ignore[misc]
        lm = dlm.load(str(out))
        passes = args.passes * (4 if kind == "uniform" else 1)  # whose estimate has the larger error
        rows[kind] = cost | kept(out / "bound.json", lambda lm=lm, passes=passes: bound(lm, args.genome, passes, args.windows))  # type: ignore[misc]
        print(f"{kind}: {rows[kind]}", flush=True)
        sampled = kept(
            out / "samples.json",
            lambda lm=lm, kind=kind: {"rows": written(lm, kind, args.samples, args.length, args.steps).tolist()},  # type: ignore[misc]
        )
        made[kind] = np.array(sampled["rows"])
    made |= {f"counts of order {k}": model.sample(args.samples, args.length, k, rng) for k in sorted({best, args.order})}
    found = {name: quality(one, held) for name, one in made.items()}
    show(rows, counts, best, found)
    if args.plot is not None:
        plot(rows, counts, found, args.plot)
    result: dict[str, Any] = {"benchmark": "dna", "machine": platform.processor() or platform.machine(), "genome": Path(args.genome).name}
    short = {name: {key: value for key, value in one.items() if key not in ("power", "frames")} for name, one in found.items()}
    result |= {"bases": sum(map(len, fasta.runs)), "settings": args.settings, "counts": counts, "models": rows, "written": short}
    if not args.quick and args.kinds:
        with HISTORY.open("a") as file:
            file.write(dumps(result) + "\n")
    print(dumps(result))


def show(rows: dict[str, dict[str, Any]], counts: list[float], best: int, found: dict[str, dict[str, Any]]) -> None:
    table = Table("model", "bits a base", "CPU seconds", "steps", box=None)
    for kind, row in rows.items():
        sign = "<= " if row["is_bound"] else ""
        table.add_row(kind, f"{sign}{row['bits']:.4f} +- {row['stderr']:.4f}", f"{row['seconds']:.0f}", str(row["steps"]))
    table.add_row(f"counts, order {best} (the best)", f"{counts[best]:.4f}", "", "")
    Console(width=100).print(table)
    for kind, row in rows.items():
        if "lone_bits" in row:
            right = f"{row['lone_right']:.1%} right"
            print(f"{kind}, one base masked in {LONE}: {row['lone_bits']:.4f} +- {row['lone_stderr']:.4f} bits, {right}")
    table = Table("written by", *(f"JSD {k}-mers" for k in SIZES), "GC", "period 3", "longest frame", box=None)
    for name, one in found.items():
        spectra = [f"{one['divergence'][str(k)]:.4f}" for k in SIZES]
        rhythm, longest = (f"{one[key]:.1f} +- {one[key + '_band95']:.1f}" for key in ("rhythm", "longest"))
        table.add_row(name, *spectra, f"{one['gc']:.3f}", rhythm, longest)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
