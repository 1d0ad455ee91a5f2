"""Batch-invariant logits are bitwise identical however the network is called.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dlm.inference import quantized_linear
from dlm.language_model import load
from inference.networks import LENGTH, in_calls, model, text


@pytest.mark.parametrize(("dtype", "conv"), [("float32", 0), ("bfloat16", 0), ("int8", 0), ("int4", 0), ("float32", 3), ("bfloat16", 3)])
def test_logits_are_batch_invariant(dtype: str, conv: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_linear, "LARGE_HEAD_WEIGHTS", 1000)  # in few bits a shortlist, too
    model(conv=conv).save_pretrained(tmp_path)
    made = load(str(tmp_path), dtype=dtype, deterministic=True)
    z_BT = text(made)
    whole = in_calls(made.network, z_BT, LENGTH)
    for size in (1, 4, 7, 16):
        assert torch.equal(in_calls(made.network, z_BT, size), whole), size
    assert torch.equal(in_calls(made.network, z_BT[1:2], 4), whole[1:2])
    with torch.no_grad():
        cache = made.network.cache(3)
        assert torch.equal(torch.cat([made.network(z_BT[:, i : i + 1], cache=cache) for i in range(LENGTH)], 1), whole)
        assert torch.equal(made.network(z_BT), whole)
        plain = load(str(tmp_path), dtype=dtype).network(z_BT)
    close = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.02, "int4": 0.1}[dtype]
    torch.testing.assert_close(whole, plain, atol=close, rtol=close)


def test_near_ties_are_decided_alike(tmp_path: Path) -> None:
    """In bfloat16 the likeliest token depends on the number of positions of a forward pass, but not in a batch-invariant network."""
    model(layers=4).save_pretrained(tmp_path)
    plain, invariant = (load(str(tmp_path), dtype="bfloat16", deterministic=deterministic) for deterministic in (False, True))
    z_BT = torch.randint(plain.tokenizer.vocab_size, (24, LENGTH), generator=torch.Generator().manual_seed(1))
    flips = [int((in_calls(m.network, z_BT, 1).argmax(-1) != in_calls(m.network, z_BT, 15).argmax(-1)).sum()) for m in (plain, invariant)]
    assert flips[0] > 0
    assert flips[1] == 0
    options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 24}
    for word in ("lookup:4", "strided:3"):
        assert invariant.generate("ROMEO", sampler=word, **options).text == invariant.generate("ROMEO", **options).text
