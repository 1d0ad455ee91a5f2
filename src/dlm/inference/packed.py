"""Weights prepacked for oneDNN: a second copy in its blocked layout, in which products of several rows take less time. CPU only."""

from __future__ import annotations

import itertools
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_FOR_ROWS = 16  # rows of a product that the layout is chosen for
MANY_ROWS = 64  # rows above which a product has a multiple of 16: oneDNN compiles a kernel for each number of rows, in half a millisecond
SERIALS = itertools.count()


class PrepackedLinear(nn.Module):
    """A linear layer that prepacks its weights when they are first wanted so, and anew when they change."""

    def __init__(self) -> None:
        super().__init__()
        self.packs = False  # whether memory allows a second copy
        self.prepacked: tuple[Tensor, int] | None = None  # and the version of the weights that it was made of
        self.register_buffer("serial", torch.tensor(next(SERIALS)), persistent=False)  # a graph may hold this, but no layer
        LAYERS[int(self.serial)] = self

    serial: Tensor

    def dense_weight(self) -> Tensor:
        """The weights (O, I), float32 or bfloat16."""
        raise NotImplementedError

    def version(self) -> int:
        """Another number whenever they change."""
        return 0

    def prepacked_product(self, x: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
        """W x + b by the prepacked weights, x float32 or bfloat16 as the weights are."""
        if torch.compiler.is_compiling():  # which knows no tensors of this layout
            y: Tensor = torch.ops.dlm.product(x, outputs, bias, self.serial)
            return y
        return self.product_now(x, bias)

    def product_now(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `prepacked_product`, outside of a graph."""
        prepacked = self.prepacked
        if prepacked is None or prepacked[1] != self.version():
            packed = torch.ops.mkldnn._reorder_linear_weight(self.dense_weight().contiguous(), PACKED_FOR_ROWS)
            prepacked = self.prepacked = packed, self.version()
        rows = x.numel() // x.shape[-1]
        more = -rows % PACKED_FOR_ROWS if rows > MANY_ROWS else 0
        if more:
            x_NI = F.pad(x.reshape(rows, -1), (0, 0, 0, more))
            return self._packed_product(x_NI, prepacked[0], bias)[:rows].view(*x.shape[:-1], -1)
        return self._packed_product(x, prepacked[0], bias)

    @staticmethod
    def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return y


LAYERS: weakref.WeakValueDictionary[int, PrepackedLinear] = weakref.WeakValueDictionary()  # by serial
LIBRARY = torch.library.Library("dlm", "DEF")
LIBRARY.define("product(Tensor x, int outputs, Tensor? bias, Tensor serial) -> Tensor")


@torch.library.impl(LIBRARY, "product", "CPU")
def _product(x: Tensor, _outputs: int, bias: Tensor | None, serial: Tensor) -> Tensor:
    return LAYERS[int(serial)].product_now(x, bias)


@torch.library.register_fake("dlm::product", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _product_shape(x: Tensor, outputs: int, _bias: Tensor | None, _serial: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def prepacked_bytes(network: nn.Module) -> int:
    """Of the second copies that the layers of a network hold."""
    held = [module.prepacked for module in network.modules() if isinstance(module, PrepackedLinear)]
    return sum(pair[0].numel() * pair[0].element_size() for pair in held if pair is not None)
