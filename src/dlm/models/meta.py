"""Networks whose weights come from elsewhere: made on the meta device, where nothing is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _Undrawn(TorchFunctionMode):
    """Weights are not drawn: on the meta device torch imports its compiler for normal numbers, which takes a second or two."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made here have shapes and no weights, until `load_state_dict(..., assign=True)` gives them some."""
    with torch.device("meta"), _Undrawn():
        yield
