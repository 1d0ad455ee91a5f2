"""The processes of a run: one alone, or as many as accelerate was told, with DDP or FSDP2."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from dlm.errors import InputError


def accelerate(batch: int, *, bf16: bool) -> Accelerator:
    """The accelerator of this process. InputError where the processes do not know of each other, or `batch` does not divide over them."""
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    if accelerator.num_processes < (launched := int(os.environ.get("WORLD_SIZE", 1))):
        raise InputError(f"launched as {launched} processes that know nothing of each other: on CPUs set ACCELERATE_USE_CPU=true")
    if batch % accelerator.num_processes:
        raise InputError(f"batch {batch} does not divide over {accelerator.num_processes} processes")
    return accelerator


class Processes:
    """The interface of the processes for the loop. Without an accelerator there is one, on `device`."""

    def __init__(self, accelerator: Accelerator | None = None, device: torch.device | None = None) -> None:
        self.accelerator = accelerator
        self.device = accelerator.device if accelerator else device or torch.device("cpu")
        self.count: int = accelerator.num_processes if accelerator else 1
        self.main: bool = accelerator.is_main_process if accelerator else True

    def mean(self, x: Tensor) -> Tensor:
        """Of this tensor over all processes, by element."""
        if self.accelerator is None:
            return x
        mean: Tensor = self.accelerator.reduce(x, "mean")
        return mean

    def any(self, flag: bool) -> bool:
        """True on every process if it is on one: all must leave at the same step."""
        if self.accelerator is None or self.count == 1:
            return flag
        total: Tensor = self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum")
        return bool(total.item() > 0)

    def wait(self) -> None:
        """Until all are here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
