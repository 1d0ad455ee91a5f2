"""Prepacked weights give the same products, where memory allows a second copy.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import pytest
import torch

from dlm.inference import fused
from dlm.models import hardware
from dlm.models.block import Linear
from dlm.models.transformer import Transformer
from inference.networks import model


@pytest.mark.parametrize(("dtype", "close", "least"), [(torch.float32, 1e-5, 3), (torch.bfloat16, 0.05, 1)])
def test_prepacked_products_are_the_same(dtype: torch.dtype, close: float, least: int) -> None:
    """It is made when it is first needed, and again when the weights change."""
    layers = [Linear(24, 40, dtype=dtype), Linear(24, 8, dtype=dtype)]
    product = fused.JoinedLinear(layers)
    product.packs = hardware.prepacks(dtype)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for change in (0.0, 1.0):
            layers[1].weight.add_(change)
            for rows in (1, 2, 3, 17, 65, 96, 256, 257):
                x_BNI = torch.randn(1, rows, 24, generator=rng).to(dtype)
                found = product(x_BNI)
                torch.testing.assert_close(found, torch.cat([layer(x_BNI) for layer in layers], -1), atol=close, rtol=close)
                assert (product.prepacked is not None) == (product.packs and (rows >= least or change > 0))
                assert found.shape == (1, rows, 48)


def test_inputs_that_autocast_has_cast_take_the_plain_product() -> None:
    """As in the preview of a training in bfloat16."""
    layer = Linear(24, 40)
    product = fused.JoinedLinear([layer])
    product.packs = hardware.prepacks(torch.float32)
    x_BNI = torch.randn(1, 17, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(product(x_BNI.bfloat16()), layer(x_BNI), atol=0, rtol=0)


def head_packs(network: Transformer) -> bool:
    product = network.get_submodule("head.fused.product")
    assert isinstance(product, fused.JoinedLinear)
    return product.packs


def test_large_networks_are_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = model(), model()
    fused.fuse(small.network)
    assert head_packs(fused.fuse(model().network.bfloat16())) == hardware.prepacks(torch.bfloat16)
    monkeypatch.setattr(fused, "PREPACK_BYTES", 1000)
    fused.fuse(large.network)
    assert head_packs(small.network)
    assert not head_packs(large.network)


@pytest.mark.parametrize(
    ("name", "wide", "most"), [("AMD EPYC", True, 2**20), ("AMD EPYC", False, 128), ("Intel Xeon", True, 128), ("", True, 128)]
)
def test_many_rows_are_for_processors_that_mkl_knows_less_of(name: str, wide: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name, "avx512_f": wide} if name else {}, raising=False)
    rows = hardware.prepacked_rows(torch.float32)
    assert most in rows
    assert (most + 1 in rows) == (most > 128)
