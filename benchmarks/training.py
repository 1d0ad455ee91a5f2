"""Tokens per second of dlm's training steps and of a plain causal loop of the same size, as shares of the machine's matmul peak.

    python benchmarks/training.py                   # the recipe's size on the CPU, one thread
    python benchmarks/training.py --device cuda --steps 50
    python benchmarks/training.py --quick           # does it run?

The plain loop is what nanoGPT does (its network, random windows, AdamW, clipping) without noise, average or accelerate. All take turns
within each repeat, and the peak beside each of them, so that a slow minute of the machine falls on all of them. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dlm.models.config import TransformerConfig
from dlm.models.hardware import multiplies_bf16
from dlm.noise.masked import MaskedNoise
from dlm.train import recipes
from dlm.train.config import TrainConfig
from dlm.train.data import Stream
from dlm.train.learner import Learner

Step = Callable[[int], object]
BLOCK = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.ln1(x_BTD)).split(width, dim=2))
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(y_BHTK.transpose(1, 2).reshape(batch, length, width))
        y_BTD: Tensor = x_BTD + self.down(F.gelu(self.up(self.ln2(x_BTD))))
        return y_BTD


class PlainGPT(nn.Module):
    """GPT-2 as nanoGPT writes it: learned positions, LayerNorm, GELU, tied head."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(c.vocab_size, c.width), nn.Embedding(c.window, c.width)
        self.blocks = nn.Sequential(*(PlainBlock(c.width, c.heads) for _ in range(c.layers)))
        self.norm, self.head = nn.LayerNorm(c.width, bias=False), nn.Linear(c.width, c.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(x_BT) + self.positions(torch.arange(x_BT.shape[1], device=x_BT.device))
        logits_BTV = self.head(self.norm(self.blocks(x_BTD)))
        return F.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten())


def plain_step(config: TrainConfig, data_N: np.ndarray, device: torch.device) -> Step:
    torch.manual_seed(0)
    network = PlainGPT(config.network).to(device)
    groups = [
        {"params": [p for p in network.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in network.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=device.type == "cuda" or None)
    if config.compile:
        network.compile()
    window, rng = config.network.window, np.random.default_rng(0)

    def step(_number: int) -> Tensor:
        starts = rng.integers(len(data_N) - window, size=config.batch)
        x_BT, y_BT = (torch.from_numpy(data_N[starts[:, None] + np.arange(window) + k].astype(np.int64)).to(device) for k in (0, 1))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            loss: Tensor = network(x_BT, y_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def dlm_step(config: TrainConfig, data_N: np.ndarray, device: torch.device) -> Step:
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no", cpu=device.type == "cpu")
    size = config.network.vocab_size
    return Learner(config, config.network, MaskedNoise(size, size - 1), Stream(data_N, config.network.window), accelerator).update


def flops_per_token(c: TransformerConfig, *, causal: bool) -> int:
    """Forward and backward: 6 for each weight of a product, 12 D T for each layer's attention, half of it where causal."""
    weights = c.layers * (4 * c.width**2 + 2 * c.width * c.mlp_width) + c.width * c.vocab_size
    return 6 * weights + 12 * c.layers * c.width * c.window // (2 if causal else 1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """FLOP/s of the best of ten products of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        synchronize(device)
        clock = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - clock))
    return best


@dataclass
class Candidate:
    name: str
    mode: str
    dtype: str
    flops: int
    step: Step
    rates: list[float]  # tokens per second, one a repeat
    shares: list[float]  # of the matmul peak of the same repeat
    done: int = 0

    def run(self, steps: int, device: torch.device) -> float:
        """Seconds of `steps` steps."""
        synchronize(device)
        clock = time.perf_counter()
        for _ in range(steps):
            self.step(self.done)
            self.done += 1
        synchronize(device)
        return time.perf_counter() - clock


def warmed_up(
    config: TrainConfig, modes: Sequence[str], dtypes: Sequence[str], data_N: np.ndarray, device: torch.device, console: Console
) -> Iterator[Candidate]:
    """Our steps and the plain one in every mode and type, each after two steps. A token of block diffusion is read noisy and clean."""
    for dtype, mode in itertools.product(dtypes, modes):
        settings = replace(config, bf16=dtype == "bfloat16", compile=mode == "compiled")
        blocks = replace(settings, network=config.network.with_(attention="block_causal", block_length=BLOCK))
        whole, causal = (flops_per_token(config.network, causal=causal) for causal in (False, True))
        for name, make, chosen, flops in (
            ("dlm masked", dlm_step, settings, whole),
            ("dlm block", dlm_step, blocks, 2 * causal),
            ("plain causal", plain_step, settings, causal),
        ):
            candidate = Candidate(name, mode, dtype, flops, make(chosen, data_N, device), [], [])
            console.print(f"warming up: {name}, {mode}, {dtype}", highlight=False)
            candidate.run(2, device)
            yield candidate


def measure(
    candidates: Sequence[Candidate], steps: int, repeats: int, tokens: int, device: torch.device, size: int, console: Console
) -> dict[str, list[float]]:
    """Tokens a second of every candidate, taken in turns; returns the peak of each type in each repeat, FLOP/s. tokens: of the steps of one
    repeat. size: of the product. The peak takes its turn beside each candidate: what else the machine does changes it by half."""
    peaks: dict[str, list[float]] = {candidate.dtype: [] for candidate in candidates}
    for repeat in range(repeats):
        console.print(f"repeat {repeat + 1} of {repeats}", highlight=False)
        for candidate in candidates:
            dtype = DTYPES[candidate.dtype]
            before = matmul_peak(dtype, device, size)
            rate = tokens / candidate.run(steps, device)
            peak = max(before, matmul_peak(dtype, device, size))
            candidate.rates.append(rate)
            candidate.shares.append(rate * candidate.flops / peak)
            peaks[candidate.dtype].append(peak)
    return peaks


def row_of(x: Candidate, table: Table) -> dict[str, object]:
    """The figures of a candidate, shown in the table too."""
    median, share = statistics.median(x.rates), statistics.median(x.shares)
    table.add_row(x.name, x.mode, x.dtype, f"{median:,.0f}", f"{min(x.rates):,.0f} .. {max(x.rates):,.0f}", f"{share:.1%}")
    row = {"step": x.name, "mode": x.mode, "dtype": x.dtype, "tokens_per_second": median, "rates": x.rates, "shares": x.shares}
    return row | {"flops_per_token": x.flops, "share_of_peak": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="shakespeare-mask")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each candidate in a repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--dtypes", help="default: float32, and bfloat16 where the machine multiplies it")
    parser.add_argument("--batch", type=int, help="windows a step; default: the recipe's")
    parser.add_argument("--quick", action="store_true", help="a tiny network, two repeats, nothing compiled")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, console = torch.device(args.device), Console(stderr=True)
    recipe, modes, product = recipes.find(args.recipe), args.modes.split(","), 8192 if args.device == "cuda" else 1536
    network = recipe.network.with_(vocab_size=66)
    config = replace(recipe, network=network, batch=args.batch or recipe.batch, steps=1_000_000, data="random")
    if args.quick:
        tiny = network.with_(layers=2, heads=2, width=32, window=32)
        config, modes, product = replace(config, network=tiny, context=8, batch=4), ["eager"], 256
        args.steps, args.repeats = 2, 2
    data_N = np.random.default_rng(0).integers(65, size=200_000, dtype=np.int32)
    dtypes = args.dtypes.split(",") if args.dtypes else ["float32", *(["bfloat16"] if multiplies_bf16(device) else [])]

    candidates = list(warmed_up(config, modes, dtypes, data_N, device, console))
    tokens = args.steps * config.batch * config.network.window
    found = measure(candidates, args.steps, args.repeats, tokens, device, product, console)
    peaks = {dtype: statistics.median(values) for dtype, values in found.items()}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {args.threads} thread(s)"
    c = config.network
    title = f"{where}: {c.layers} layers, width {c.width}, window {c.window}, batch {config.batch}"
    table = Table("step", "mode", "dtype", "tokens/s", "spread", "of matmul peak", box=None, title=title, header_style="bold")
    rows = [row_of(x, table) for x in candidates]
    Console(width=120).print(table)
    peak_words = ", ".join(f"{dtype} {value / 1e12:.3f} TFLOP/s" for dtype, value in peaks.items())
    print(f"matmul peak ({product} x {product}): {peak_words}")
    facts = {"device": where, "torch": torch.__version__, "threads": args.threads, "steps": args.steps, "repeats": args.repeats}
    sizes = {"recipe": args.recipe, "batch": config.batch, "network": config.network.to_dict(), "quick": args.quick}
    print(json.dumps(facts | sizes | {"peak_flops": peaks, "results": rows}))


if __name__ == "__main__":
    main()
