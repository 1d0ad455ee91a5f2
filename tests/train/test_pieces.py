"""A batch that is worked on piece by piece: the noise and the gradient of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dlm.train import learner, processes, setup
from dlm.train.loop import Update
from dlm.train.training import Training
from train import tiny

SETTINGS = {
    "masked": ("conv=3",),
    "blocks": ("attention=block_causal", "block_length=8", "block_lengths=4,8"),
    "autoregressive": ("objective=autoregressive",),
    "uniform": ("noise=uniform",),
    "classes": ("noise=classes",),
    "learned orders": ("noise=ordered",),
    "levels": ("levels=0.5,1",),
}


def test_rows_of_a_piece() -> None:
    assert learner.pieces(slice(8, 21), 256, 1, 1024) == [slice(8, 12), slice(12, 16), slice(16, 20), slice(20, 21)]
    assert learner.pieces(slice(0, 4), 2048, 1, 1024) == [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)]
    assert learner.pieces(slice(0, 4), 2048, 2, 1024) == [slice(0, 2), slice(2, 4)]
    assert learner.pieces(slice(0, 4), 200, 2, 1024) == [slice(0, 4)]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_in_pieces_is_that_of_the_whole_batch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(tiny.write_text(tmp_path / "text.txt"), *SETTINGS[name], "optimizer=adamw", "batch=6", "clip=1e9")
    found: list[tuple[int, Update, list[torch.Tensor]]] = []
    for tokens in (1, 1024):
        monkeypatch.setitem(learner.PIECE_TOKENS, False, tokens)
        task = Training(config, setup.resolve(config), processes.accelerate(config.batch, bf16=False), tmp_path / "run", {})
        taken: list[torch.Tensor] = []
        optimizer = task.learner.optimizer
        optimizer.register_step_pre_hook(lambda opt, *_, taken=taken: taken.extend(p.grad for g in opt.param_groups for p in g["params"]))
        update = task.update(0)
        if task.learner.noise_weights is not None:
            taken.append(task.learner.noise_weights.log_weights.detach().clone())
        found.append((len(task.learner.pieces), update, taken))
    (many, one, ours), (single, other, whole) = found
    assert (many, single) == (3 if name == "learned orders" else 6, 1)
    assert torch.allclose(one.nats, other.nats, rtol=1e-6)
    assert len(ours) == len(whole) > 10
    for mine, its in zip(ours, whole, strict=True):
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-6 * float(its.abs().max()))
