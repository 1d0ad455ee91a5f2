"""Files of an adapter or heads: JSON with its settings and the fingerprint of its base, and its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlm.errors import InputError
from dlm.files import check_stamp, check_types, read_json, replacing_files, stamp

Config = TypeVar("Config")
FORMAT = 1


def save(weights: Path, state: Mapping[str, Tensor], about: Path, config: Any, *, dtype: torch.dtype) -> None:
    """Write the tensors in this dtype, then the fields of `config` beside them, each whole or not at all."""
    about.parent.mkdir(parents=True, exist_ok=True)
    with replacing_files(about.parent, order=lambda file: file.name == about.name) as temporary:
        save_file({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}, temporary / weights.name)
        (temporary / about.name).write_text(json.dumps(stamp(FORMAT) | asdict(config), indent=2) + "\n", encoding="utf-8")


def read_config(about: Path, kind: type[Config], what: str) -> Config:
    """The fields of this kind. InputError where they do not describe `what`, or a later format does."""
    data = read_json(about)
    if not isinstance(data, dict):
        raise InputError(f"{about} does not describe {what} (it holds a {type(data).__name__})")
    check_stamp(data, FORMAT, about)
    check_types(kind, data, about, f"does not describe {what}")
    try:
        return kind(**{f.name: data[f.name] for f in fields(kind)})  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError, InputError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{about} does not describe {what} ({reason})") from None


def check_base(config: Any, own: str, what: str) -> None:
    """InputError unless it was made for the base with this fingerprint. what: `the adapter in ... was`."""
    if config.fingerprint != own:
        names = f"{config.base}, fingerprint {config.fingerprint[:12]}; this one has {own[:12]}"
        raise InputError(f"{what} made for another base ({names})")


def read_weights(weights: Path) -> dict[str, Tensor]:
    """InputError where they are missing or damaged."""
    try:
        return load_file(weights)
    except (SafetensorError, FileNotFoundError) as error:
        raise InputError(f"{weights} is missing, truncated or damaged ({error}): convert the base again") from None


@torch.no_grad()
def fill(own: Mapping[str, Tensor], state: Mapping[str, Tensor], weights: Path, about: Path) -> None:
    """Copy the weights that were read into these tensors. InputError, and nothing copied, where they do not fit or are not finite."""
    wrong = [n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape]
    wrong += [n for n in state if not bool(state[n].isfinite().all())]
    if wrong:
        raise InputError(f"{weights} is damaged or does not fit its {about.name} (first: {sorted(wrong)[0]}): convert the base again")
    for name, tensor in own.items():
        tensor.copy_(state[name])
