"""Weights that torch.save wrote, read with `weights_only`, which unpickles tensors and plain values and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from dlm.errors import InputError
from dlm.formats import native
from dlm.formats.stored import Stored


def weights(path: Path, *, copied: bool = False) -> dict[str, Stored]:
    """The tensors of a .pt file, or of the only .pt or pytorch_model.bin in a directory without safetensors; else as `native.weights`.

    InputError for a file that holds anything else.
    """
    if path.is_dir():
        files = sorted([*path.glob("*.pt"), *path.glob("pytorch_model.bin")])
        if len(files) != 1 or (path / "model.safetensors").is_file() or (path / native.INDEX).is_file():
            return native.weights(path, copied=copied)
        path = files[0]
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than tensors, which dlm never unpickles: save the state dict of its model alone") from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path} is no whole file of torch.save ({str(error).splitlines()[0]}): fetch it again") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise InputError(f"{path} is no state dict, a tensor for each name: save that of its model alone")
    return {str(name): _stored(tensor) for name, tensor in found.items()}


def _stored(tensor: torch.Tensor) -> Stored:
    def read() -> torch.Tensor:
        return tensor.clone()

    return Stored(tuple(tensor.shape), read)
