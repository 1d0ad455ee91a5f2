"""A network and a text so small that a run takes a second, and ways to look at what a run left.

    python tests/train/tiny.py OUT TEXT '["steps=9"]' '{"resume": true}'

is the training of the tests in a process of its own, alone or under `accelerate launch`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dlm.models.config import TransformerConfig
from dlm.train import processes
from dlm.train.config import TrainConfig
from dlm.train.loop import quiet
from dlm.workflows.fit import fit

NETWORK = TransformerConfig(vocab_size=1, layers=2, heads=2, width=32, window=32)
CONFIG = TrainConfig(
    network=NETWORK, context=8, batch=4, steps=12, warmup=3, lr=1e-2, ema=0.8, log_every=5, eval_every=4, save_every=3, eval_windows=8
)


def write_text(path: Path, size: int = 6000) -> Path:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away\n"]
    path.write_text(" ".join(random.Random(0).choices(words, k=size // 5))[:size], encoding="utf-8")
    return path


def config(data: Path, *settings: str) -> TrainConfig:
    """The tiny config with `key=value` words applied; causal where the objective asks for it."""
    causal = ["attention=causal"] if "objective=autoregressive" in settings else []
    return CONFIG.with_settings([f"data={data}", *causal, *settings])


def run(data: Path, out: Path, *settings: str, **options: Any) -> dict[str, Any]:
    """The figures of a run."""
    record = fit(config(data, *settings), out, progress=quiet, **options).record()
    return {name: value for name, value in record.items() if name not in ("format", "model")}


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Weights, average and moments of the last save."""
    return load_file(out / "training.safetensors")


def curve(out: Path) -> list[dict[str, float]]:
    """The log without the rates, which differ from run to run."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def assert_same(a: Path, b: Path) -> None:
    """Two runs left the same state and the same curve, to the bit."""
    for file in ("training.safetensors", "model.safetensors"):
        first, second = load_file(a / file), load_file(b / file)
        assert first.keys() == second.keys()
        assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert curve(a) == curve(b)


def shard_on_cpu() -> None:
    """Make accelerate choose FSDP2 for CPU processes, as it does for GPUs; it offers that to accelerators alone."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    def sharded(**options: Any) -> Accelerator:
        made = Accelerator(**options)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
        made.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        return made

    vars(processes)["Accelerator"] = sharded


def as_rank(
    rank: int, ranks: int, port: int, sharded: bool, data: Path, out: Path, settings: tuple[str, ...], options: dict[str, Any]
) -> None:
    """One of several CPU processes, told of the others as launchers tell them."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if sharded:
        shard_on_cpu()
    run(data, out, *settings, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[2]), Path(sys.argv[1]), *json.loads(sys.argv[3]), **json.loads(sys.argv[4]))
