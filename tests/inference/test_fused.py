"""Fused modules give the logits of the plain ones, hold no weight twice, and go with gradients and adapters.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from dlm.adapters import lora
from dlm.inference import fused, quantize
from dlm.language_model import load
from inference.networks import LENGTH, LLAMA, OURS, in_calls, model, text


@pytest.mark.parametrize("sizes", [LLAMA, OURS], ids=["llama", "ours"])
def test_fused_logits_are_those_before(sizes: dict[str, Any]) -> None:
    made = model(**sizes)
    z_BT = text(made)
    with torch.no_grad():
        before = made.network(z_BT)
        fused.fuse(made.network)
        assert isinstance(made.network.blocks[0].attention, fused.FusedAttention)
        torch.testing.assert_close(made.network(z_BT), before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(in_calls(made.network, z_BT, 1), before, atol=1e-4, rtol=1e-4)


def test_fused_weights_are_the_layers_own(tmp_path: Path) -> None:
    plain, made = model(), model()
    fused.fuse(made.network)
    assert made.network.parameters_count() == plain.network.parameters_count()
    assert lora.fingerprint(made.network) == lora.fingerprint(plain.network)
    made.save_pretrained(tmp_path)
    again = load(str(tmp_path)).network.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.network.state_dict().items())
    # a step of training reaches what is read without gradients
    made.network.requires_grad_(True)
    optimizer, z_BT = torch.optim.SGD(made.network.parameters(), lr=1.0), text(made)
    made.network(z_BT).logsumexp(-1).mean().backward()
    assert made.network.get_parameter("blocks.1.attention.k.weight").grad is not None
    optimizer.step()
    with torch.no_grad():
        joined = made.network(z_BT)
    torch.testing.assert_close(joined, made.network(z_BT), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(joined, plain.network(z_BT), atol=1e-3)
    half = fused.fuse(made.network.to(torch.bfloat16))  # moved apart by the cast, and joined again
    joined_in = half.get_submodule("blocks.0.mlp.fused_in.product")
    assert isinstance(joined_in, fused.JoinedLinear)
    assert joined_in.weight.data_ptr() == half.get_parameter("blocks.0.mlp.gate.weight").data_ptr()


@pytest.mark.parametrize("ready", [fused.fuse, quantize.quantize])
@pytest.mark.parametrize("first", ["adapter", "network"])
def test_adapters_before_and_after(ready: Any, first: str) -> None:
    made, without = model(), model()
    config, mask_id = lora.AdapterConfig(rank=4, alpha=8.0), made.tokenizer.mask_id
    reference = ready(deepcopy(without.network))
    if first == "adapter":
        lora.attach(made.network, config, mask_id)
        ready(made.network)
    else:
        lora.attach(ready(made.network), config, mask_id)
    for name, tensor in lora.adapter_state(made.network).items():
        if name.endswith("lora_B"):
            tensor.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    z_BT = text(made)
    z_BT[:, 40:] = mask_id
    with torch.no_grad():
        adapted, base = made.network(z_BT), reference(z_BT)
        assert torch.equal(adapted[:, :40], base[:, :40])
        assert not torch.isclose(adapted[:, 40:], base[:, 40:]).all(-1).any()
        if ready is fused.fuse:
            with torch.enable_grad():
                separate = made.network(z_BT)
            torch.testing.assert_close(adapted, separate, atol=1e-5, rtol=1e-5)
        lora.detach(made.network)
        assert torch.equal(made.network(z_BT), base)


@pytest.mark.parametrize("targets", [lora.TARGETS, ("k", "down"), ("up",)])
def test_low_ranks_that_read_the_same_act_together(targets: tuple[str, ...]) -> None:
    """As each by itself, whatever became of the adapter since the last call; all masks, some, and none."""
    made, rng = model(), torch.Generator().manual_seed(3)
    mask_id = made.tokenizer.mask_id
    z_BT = text(made)
    some_BT, all_BT = z_BT.clone(), torch.full_like(z_BT, mask_id)
    some_BT[:, ::3] = mask_id
    fused.fuse(made.network)
    with torch.no_grad():
        for rank in (2, 2, 3):
            lora.attach(made.network, lora.AdapterConfig(rank, 4.0, targets), mask_id)
            for _ in range(2):
                for name, tensor in lora.adapter_state(made.network).items():
                    if name.endswith("lora_B"):
                        tensor.normal_(0.0, 0.3, generator=rng)
                for read_BT in (some_BT, all_BT[:, 1:], z_BT):
                    together = in_calls(made.network, read_BT, 8) if read_BT.shape[1] == LENGTH else made.network(read_BT)
                    with torch.enable_grad():
                        apart = made.network(read_BT)
                    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
