"""Compiled blocks give the logits of the plain ones, whatever changes from forward pass to forward pass.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.adapters import lora
from dlm.errors import InputError
from dlm.inference import compiled, fused, quantize
from dlm.language_model import LanguageModel, load
from dlm.models.block import Blocks
from inference.networks import LENGTH, in_calls, model, text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.parametrize(("ready", "close", "ranks"), [(fused.fuse, 1e-4, (2, 5)), (quantize.quantize, 0.02, (2,))])
def test_compiled_logits_are_those_before(ready: Any, close: float, ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, positions, masks, adapters and the cache's room change from call to call; another network has compilations of its own."""
    monkeypatch.setattr(compiled, "BLOCKS_PER_GRAPH", 3 if ready is fused.fuse else 1)  # both blocks in a graph, or each in its own
    one, other = model(layers=2, conv=3), model(layers=2, norm_eps=1e-2)  # the same shapes
    z_BT = text(one)
    masked_BT = z_BT.clone()
    masked_BT[:, 1::2] = one.tokenizer.mask_id
    calls, masked = [(z_BT[:1], 1, 80), (z_BT[:2], 3, 100), (z_BT[:2], 4, 72)], [(masked_BT[:1], 4, 80)]

    def compare(made: LanguageModel, calls: list[tuple[Tensor, int, int]]) -> None:
        blocks = made.network.blocks
        assert isinstance(blocks, compiled.CompiledBlocks)
        made.network.blocks = Blocks(blocks)
        before = [in_calls(made.network, *call) for call in calls]
        made.network.blocks, over = blocks, blocks.over
        blocks.over = watched = Watched(over)  # type: ignore[assignment]
        for call, expected in zip(calls, before, strict=True):
            torch.testing.assert_close(in_calls(made.network, *call), expected, atol=close, rtol=close)
        assert watched.calls == sum(len(range(0, LENGTH, size)) for _, size, _ in calls)
        blocks.over = over  # type: ignore[method-assign]

    for made in (one, other):
        compiled.compile(ready(made.network))
    compare(one, calls)
    if ready is fused.fuse:
        compare(other, calls[:1])
    for rank in ranks:
        lora.attach(one.network, lora.AdapterConfig(rank, 4.0, stride=3), one.tokenizer.mask_id)
        for name, tensor in one.network.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(tensor, std=0.1)
        compare(one, calls[:1] + masked)
    lora.detach(one.network)
    compare(one, calls[:1])


class Watched:
    """How often compiled blocks were called."""

    def __init__(self, compiled: Any) -> None:
        self.compiled, self.calls = compiled, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.compiled(*args)


@torch.no_grad()
def test_rows_that_end_apart_are_not_compiled() -> None:
    made = model(layers=2)
    z_B1, apart_B = text(made)[:, :1], torch.tensor([5, 9, 9])
    found = []
    for ready in (fused.fuse, compiled.compile):
        ready(made.network)
        cache = made.network.ragged_cache(3, LENGTH)
        in_calls(made.network, text(made)[:, :10], 10, cache=cache)
        cache.trim(apart_B)
        own_B11 = torch.ones(3, 1, 1, dtype=torch.bool)
        found.append(made.network(z_B1, pos_BQ=apart_B[:, None], own_BQQ=own_B11, cache=cache))
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 3])
def test_both_caches_use_what_was_compiled_for_one(conv: int) -> None:
    """The same shape of the input, with positions of every row or of all."""
    made = model(layers=1, conv=conv)
    z_BT = text(made)
    before = in_calls(made.network, z_BT, 4)
    compiled.compile(made.network)
    for _ in range(2):
        torch.testing.assert_close(in_calls(made.network, z_BT, 4), before, atol=1e-4, rtol=1e-4)
        cache = made.network.cache(3)
        found = [made.network(z_BT[:, i : i + 4], cache=cache) for i in range(0, LENGTH, 4)]
        torch.testing.assert_close(torch.cat(found, 1), before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_full_cache_says_so_when_compiled() -> None:
    made = compiled.compile(model(layers=1).network)
    cache = made.cache(1, 4)
    with pytest.raises(ValueError, match="holds 4 positions, 5 were asked for"):
        made(torch.zeros(1, 5, dtype=torch.long), cache=cache)


def test_what_cannot_be_compiled(masked_dir: Path, autoregressive_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="deterministic decoding is for autoregressive"):
        load(str(masked_dir), deterministic=True)
    with pytest.raises(InputError, match="choose deterministic or compiled"):
        load(str(autoregressive_dir), compile=True, deterministic=True)
    monkeypatch.setattr("shutil.which", lambda name: None)
    for directory in (autoregressive_dir, masked_dir):
        with pytest.raises(InputError, match="install g"):
            load(str(directory), compile=True)
