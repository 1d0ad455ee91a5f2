"""Weights that are held once more in a layout of oneDNN, in which products of several rows take less time. CPU only."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor, nn

ROWS = 16  # that the layout is made for
NUMBERS = itertools.count()


class TwoLayouts(nn.Module):
    """A linear layer that makes the second layout when it is first wanted, and anew when its weights change."""

    def __init__(self) -> None:
        super().__init__()
        self.packs = False  # whether memory allows it
        self.laid_out: tuple[Tensor, int] | None = None  # and the version of the weights that it was made of
        self.register_buffer("number", torch.tensor(next(NUMBERS)), persistent=False)  # a graph may hold this, but no layer
        LAYERS[int(self.number)] = self

    number: Tensor

    def written_out(self) -> Tensor:
        """The weights (O, I)."""
        raise NotImplementedError

    def version(self) -> int:
        """Another number whenever they change."""
        return 0

    def second(self, x: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
        """W x + b, x float32 or bfloat16 as the weights are."""
        if torch.compiler.is_compiling():  # which knows no tensors of this layout
            y: Tensor = torch.ops.dlm.product(x, outputs, bias, self.number)
            return y
        return self.in_second_layout(x, bias)

    def in_second_layout(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.laid_out is None or self.laid_out[1] != self.version():
            self.laid_out = torch.ops.mkldnn._reorder_linear_weight(self.written_out().contiguous(), ROWS), self.version()
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.laid_out[0], bias, "none", [], "")
        return y


LAYERS: weakref.WeakValueDictionary[int, TwoLayouts] = weakref.WeakValueDictionary()  # by number
LIBRARY = torch.library.Library("dlm", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("product(Tensor x, int outputs, Tensor? bias, Tensor number) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.impl(LIBRARY, "product", "CPU")
def _numbered(x: Tensor, outputs: int, bias: Tensor | None, number: Tensor) -> Tensor:
    return LAYERS[int(number)].in_second_layout(x, bias)


@torch.library.register_fake("dlm::product", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _shape(x: Tensor, outputs: int, bias: Tensor | None, number: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def available(dtype: torch.dtype) -> bool:
    """Whether this machine has such a layout for weights of this type."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def second_layout(module: nn.Module) -> list[Tensor]:
    """The weights that a layer holds once more."""
    return [module.laid_out[0]] if isinstance(module, TwoLayouts) and module.laid_out is not None else []
