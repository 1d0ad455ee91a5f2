"""The training state in one safetensors file, so that one rename makes a save whole: weights, average, moments, step.

Works for one process, DDP and FSDP2 alike: torch's distributed state-dict API gathers and scatters full tensors.
"""

from __future__ import annotations

import json
from collections import defaultdict
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
from dlm.files import check_stamp, replacing, stamp
from dlm.train.optimisers import EMA

FILE = "training.safetensors"
FORMAT = 1
MOMENT = "optimizer.state."
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Full copies on the CPU (none on ranks other than 0 where there are several); collective."""
    state: dict[str, Any] = get_model_state_dict(network, options=FULL)
    return {name: tensor.detach().clone() for name, tensor in state.items()}  # on a CPU they would be the parameters themselves


def averaged(network: nn.Module, ema: EMA) -> dict[str, Tensor]:
    """The averaged weights, as `weights`; collective."""
    with ema.swapped():
        return weights(network)


def save(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], meta: dict[str, Any], *, main: bool
) -> None:
    """Write everything that a resumed run needs; collective."""
    moments: dict[str, Any] = get_optimizer_state_dict(network, optimizer, options=FULL)
    tensors = {f"model.{k}": v for k, v in weights(network).items()}
    tensors |= {f"ema.{k}": v for k, v in average.items()}
    for parameter, values in moments.get("state", {}).items():
        tensors |= {f"{MOMENT}{parameter}.{name}": value.contiguous() for name, value in values.items()}
    if main:
        write(path, tensors, meta)


def write(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """One file, renamed into place; `read_meta` gives its meta back."""
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"meta": json.dumps(stamp(FORMAT) | meta)})


def read_meta(path: Path) -> dict[str, Any]:
    """Step and config of a saved state. InputError where the file is damaged or of a later format."""
    try:
        with safe_open(path, framework="pt") as file:
            meta: dict[str, Any] = json.loads((file.metadata() or {})["meta"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is no whole training state ({error}): delete it and train again") from None
    check_stamp(meta, FORMAT, path)
    return meta


def load(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> None:
    """Put weights, average and moments back, bit for bit; collective."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)

    def part(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    set_model_state_dict(network, part("ema."), options=FULL)
    ema.average = [p.detach().clone() for p in ema.parameters]
    moments: dict[str, Any] = get_optimizer_state_dict(network, optimizer)  # for its groups: hyper-parameters and names
    moments["state"] = defaultdict(dict)
    for key, value in part(MOMENT).items():
        parameter, _, name = key.rpartition(".")
        moments["state"][parameter][name] = value
    set_optimizer_state_dict(network, optimizer, optim_state_dict=moments, options=FULL)
    set_model_state_dict(network, part("model."), options=FULL)
