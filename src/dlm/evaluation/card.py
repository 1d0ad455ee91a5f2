"""The evaluation card: everything needed to judge or repeat a number, saved beside it as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from dlm.files import write_text

PACKAGES = ("dlm", "torch", "numpy", "tokenizers", "safetensors")


def device_name(device: str | torch.device) -> str:
    """GPU name, or the processor's as the system tells it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def make(
    figures: Mapping[str, object],
    *,
    device: str,
    dtype: str,
    seed: int,
    settings: Mapping[str, object],
    data: Mapping[str, object],
) -> dict[str, object]:
    """The card of one measurement. `data` holds source, split and fingerprint."""
    return {
        "format": 1,
        "figures": figures,
        "settings": settings,
        "seed": seed,
        "data": data,
        "device": device_name(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def dumps(value: object, indent: int | None = None) -> str:
    """JSON; nan is null."""
    return json.dumps(_known(value), indent=indent, allow_nan=False)


def _known(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _known(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_known(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(card: Mapping[str, object], path: str | Path) -> None:
    """Save, to a temporary name first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dumps(card, indent=2) + "\n")
