"""The training state in one safetensors file, so that one rename makes a save whole: weights, average, moments, step.

Works for one process, DDP and FSDP2 alike: torch's distributed state-dict API gathers and scatters full tensors.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dlm.errors import InputError
from dlm.files import check_stamp, check_types, parse_json, replacing, stamp, sweep
from dlm.train.optimisers import EMA

FILE = "training.safetensors"
FORMAT = 1
MOMENT = "optimizer.state."
TRAINED_MOMENT = "optimizer."
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)

Meta = dict[str, Any]
"""The header of a state: format, verb (train or convert), step, recent losses, config."""


@dataclass(frozen=True)
class _Meta:
    """The types of its entries."""

    verb: str
    step: int
    recent: list[float]
    best: float
    config: dict[str, Any]


def begin(out: Path, verb: str, *, resume: bool, optimizer: str) -> Meta:
    """The meta of the run in `out` to resume, empty for a new one. verb: train or convert.

    InputError where `out` is a file, and where there is nothing to resume, a run already, one of the other verb, or of another optimiser.
    """
    saved = out / FILE
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: --out is a directory, give another name")
    if resume and not saved.is_file():
        raise InputError(f"nothing to resume in {out}: {verb} without --resume first")
    if not resume and saved.is_file():
        raise InputError(f"{out} holds a run already: add --resume, or choose another --out")
    if not resume:
        return {}
    meta = read_meta(saved)
    if lacking := [name for name in ("step", "config") if name not in meta]:
        raise InputError(f"{saved} is no whole training state (it lacks {lacking[0]}): delete it and train again")
    if meta["verb"] != verb:
        raise InputError(f"{out} holds a run of dlm {meta['verb']}, not of dlm {verb}: choose another --out")
    if (was := meta["config"].get("optimizer", "adamw")) != optimizer:
        raise InputError(f"{out} was begun with optimizer={was}, whose state {optimizer} cannot take: resume with {was}")
    return meta


def clear(out: Path) -> None:
    """Make the directory, without the temporary files of a run that was killed while it saved."""
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Full copies on the CPU (none on ranks other than 0 where there are several); collective."""
    state: dict[str, Any] = get_model_state_dict(network, options=FULL)
    return {name: tensor.detach().clone() for name, tensor in state.items()}  # on a CPU they would be the parameters themselves


def averaged(network: nn.Module, ema: EMA) -> dict[str, Tensor]:
    """The averaged weights, as `weights`; collective."""
    with ema.swapped():
        return weights(network)


def save(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    meta: Meta,
    *,
    main: bool,
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Write everything that a resumed run needs; collective. more: tensors of other parts, by names with a prefix of their own."""
    moments: dict[str, Any] = get_optimizer_state_dict(network, optimizer, options=FULL)
    tensors = {f"model.{k}": v for k, v in weights(network).items()}
    tensors |= {f"ema.{k}": v for k, v in average.items()}
    for parameter, values in moments.get("state", {}).items():
        tensors |= {f"{MOMENT}{parameter}.{name}": value.contiguous() for name, value in values.items()}
    tensors |= more or {}
    if main:
        write(path, tensors, meta)


def write(path: Path, tensors: Mapping[str, Tensor], meta: Meta) -> None:
    """One file, renamed into place; `read_meta` gives its meta back."""
    with replacing(path) as partial:
        save_file(dict(tensors), partial, metadata={"meta": json.dumps(stamp(FORMAT) | meta)})


def read_meta(path: Path) -> Meta:
    """Step and config of a saved state. InputError where the file is damaged or of a later format."""
    try:
        with safe_open(path, framework="pt") as file:
            meta: Meta = parse_json((file.metadata() or {})["meta"], path)
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path} is no whole training state ({error}): delete it and train again") from None
    if not isinstance(meta, dict):
        raise InputError(f"{path} is damaged (its meta is a {type(meta).__name__})")
    check_stamp(meta, FORMAT, path)
    check_types(_Meta, meta, path)
    return {"verb": "convert" if "before" in meta else "train"} | meta  # before format 1 the verb was not written


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


def save_trained(path: Path, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, meta: Meta) -> None:
    """The state of one process that trains these parameters alone: a frozen base is not in it."""
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in named.items()}
    for name, p in named.items():
        tensors |= {f"{TRAINED_MOMENT}{name}.{key}": value for key, value in optimizer.state[p].items()}
    write(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, meta)


@torch.no_grad()
def load_trained(path: Path, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put back what `save_trained` wrote, bit for bit."""
    tensors = load_file(path)
    for name, p in named.items():
        p.copy_(tensors.pop(name))
    for key, value in tensors.items():
        name, _, moment = key.removeprefix(TRAINED_MOMENT).rpartition(".")
        optimizer.state[named[name]][moment] = value if moment == "step" else value.to(named[name].device)
