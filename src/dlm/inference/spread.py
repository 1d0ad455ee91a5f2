"""A network over several devices, memory and disk, through accelerate: each block where it fits, everything else on the first device."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.models.block import AnyCache, Block, Blocks, ForwardPass
from dlm.models.transformer import Transformer

WHOLE = ["Block", "AdaLNBlock"]  # classes whose weights lie in one place
AT_ONCE = ["Experts"]  # classes whose weights are all fetched when they are called: a router is asked outside of its own call


def spread(network: Transformer, max_memory: Mapping[int | str, int | str] | None = None) -> Transformer:
    """Place the blocks on GPUs, then in memory, then in a temporary directory on disk; in place.

    max_memory: by number of a GPU or `cpu`, in bytes or as in `10GiB`; by default what is free. Blocks that lie elsewhere are moved to the
    first device for their forward pass. InputError where that device has no room for embedding and head.
    """
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.hooks import remove_hook_from_module
        from accelerate.utils import compute_module_sizes, get_balanced_memory
    except ImportError:
        raise InputError("device_map needs accelerate: pip install accelerate") from None
    try:
        memory = get_balanced_memory(network, None if max_memory is None else dict(max_memory), no_split_module_classes=WHOLE)
    except ValueError as error:
        raise InputError(f"max_memory {dict(max_memory or {})}: {str(error).splitlines()[0]}") from None
    main, sizes = next(iter(memory)), compute_module_sizes(network)
    outside = sizes[""] - sizes["blocks"]
    if outside > memory[main]:
        raise InputError(f"embedding and head take {outside:,} bytes, and {main} may hold {memory[main]:,}: raise its max_memory")
    places = infer_auto_device_map(network.blocks, memory | {main: memory[main] - outside}, no_split_module_classes=WHOLE)
    devices = {name: main for name, _ in network.named_children() if name != "blocks"}
    devices |= {f"blocks.{i}": places.get(str(i), places.get("")) for i in range(len(network.blocks))}
    folder = tempfile.mkdtemp(prefix="dlm-offload-")
    dispatch_model(network, devices, main_device=main, offload_dir=folder, preload_module_classes=AT_ONCE)
    # views of a network have a config of their own, and a forward that is bound to it
    remove_hook_from_module(network)
    network.__dict__.pop("forward", None)
    network.blocks = SpreadBlocks(network.blocks, devices, folder)
    return network


class SpreadBlocks(Blocks):
    """`Blocks` on several devices. devices: of each module; folder: of weights on disk, removed with the network."""

    def __init__(self, blocks: Iterable[Block], devices: Mapping[str, Any], folder: str) -> None:
        super().__init__(blocks)
        self.devices, self.folder = devices, folder
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def forward(self, x: Tensor, forward_pass: ForwardPass) -> Tensor:
        device = x.device
        if forward_pass.cache is not None:
            forward_pass = forward_pass._replace(cache=Carried(forward_pass.cache, device))  # type: ignore[arg-type]
        return super().forward(x, forward_pass).to(device)

    def lets_last_apart(self, forward_pass: ForwardPass) -> bool:
        return False


class Carried:
    """A cache on one device, written and read by blocks on others."""

    def __init__(self, cache: AnyCache, device: torch.device) -> None:
        self.cache, self.device = cache, device

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.write(layer, k.to(self.device), v.to(self.device))
        return keys.to(k.device), values.to(k.device)

    def write_conv(self, layer: int, x: Tensor) -> Tensor:
        return self.cache.write_conv(layer, x.to(self.device)).to(x.device)
