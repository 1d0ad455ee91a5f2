"""The training state in one safetensors file, so that one rename makes a save whole: weights, average, moments, step.

Works for one process, DDP and FSDP2 alike: torch's distributed state-dict API gathers and scatters full tensors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dlm.errors import InputError
from dlm.train.optim import EMA

FILE = "training.safetensors"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Full tensors on the CPU (empty on ranks other than 0 where the network is sharded)."""
    state: dict[str, Tensor] = get_model_state_dict(network, options=FULL)
    return state


def save(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, meta: dict[str, Any], *, main: bool) -> dict[str, Tensor]:
    """Write everything that a resumed run needs; collective. Returns the averaged weights for export."""
    tensors = {f"model.{k}": v for k, v in weights(network).items()}
    with ema.swapped():
        average = weights(network)
    tensors |= {f"ema.{k}": v for k, v in average.items()}
    moments = get_optimizer_state_dict(network, optimizer, options=FULL)
    tensors |= {f"optimizer.{k}": v for k, v in moments.items() if isinstance(v, Tensor) and k.startswith("state.")}
    if main:
        partial = path.with_name(f".{path.name}.tmp")
        try:
            unshared = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
            save_file(unshared, partial, metadata={"meta": json.dumps(meta)})
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return average


def read_meta(path: Path) -> dict[str, Any]:
    """Step and config of a saved state. InputError where the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            meta: dict[str, Any] = json.loads((file.metadata() or {})["meta"])
            return meta
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is no whole training state ({error}); start again without --resume") from None


def load(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> None:
    """Put weights, average and moments back, bit for bit; collective."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    set_model_state_dict(network, part("ema."), options=FULL)
    ema.average = [p.detach().clone() for p in ema.parameters]
    moments = get_optimizer_state_dict(network, optimizer, options=FULL) | part("optimizer.")
    set_optimizer_state_dict(network, optimizer, optim_state_dict=moments, options=FULL)
    set_model_state_dict(network, part("model."), options=FULL)
