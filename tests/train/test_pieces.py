"""A batch that is worked on piece by piece: the noise and the gradient of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dlm.train import learner, processes, setup
from dlm.train.config import TrainConfig
from dlm.train.loop import Update
from dlm.train.training import Training
from dlm.train.workers import Workers
from train import tiny

Step = tuple[learner.Learner, Update, list[torch.Tensor]]
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
    config = config_of(tmp_path, *SETTINGS[name])
    found = []
    for tokens in (1, 1024):
        monkeypatch.setitem(learner.PIECE_TOKENS, False, tokens)
        found.append(step(config, tmp_path))
    assert [len(task.pieces) for task, _, _ in found] == [3 if name == "learned orders" else 6, 1]
    same_step(*found)


@pytest.mark.parametrize("name", [*SETTINGS, "dropout"])
def test_workers_share_a_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of them takes the step of one, dropout too, and the same step each time."""
    settings = SETTINGS.get(name, ("dropout=0.2",))
    monkeypatch.setattr(learner, "LEAST_TOKENS", 1)
    monkeypatch.setitem(learner.PIECE_TOKENS, False, 1)
    found = []
    for threads in (1, 2, 3, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(step(config_of(tmp_path, *settings), tmp_path))
    assert [task.workers.count for task, _, _ in found] == [1, 2, 3, 3]
    for other in found[1:]:
        same_step(other, found[0])
    assert all(map(torch.equal, found[2][2], found[3][2]))


def config_of(tmp_path: Path, *settings: str) -> TrainConfig:
    return tiny.config(tiny.write_text(tmp_path / "text.txt"), *settings, "optimizer=adamw", "batch=6", "clip=1e9")


def step(config: TrainConfig, tmp_path: Path) -> Step:
    """The first step of a run, and its gradients."""
    task = Training(config, setup.resolve(config), processes.accelerate(config.batch, bf16=False), tmp_path / "run", {})
    taken: list[torch.Tensor] = []
    task.learner.optimizer.register_step_pre_hook(lambda opt, *_: taken.extend(p.grad for g in opt.param_groups for p in g["params"]))
    update = task.update(0)
    if task.learner.noise_weights is not None:
        taken.append(task.learner.noise_weights.log_weights.detach().clone())
    return task.learner, update, taken


def same_step(one: Step, other: Step) -> None:
    (_, mine, ours), (_, its, whole) = one, other
    assert torch.allclose(mine.nats, its.nats, rtol=1e-6)
    assert len(ours) == len(whole) > 10
    for a, b in zip(ours, whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize(("count", "threads", "each"), [(2, 2, 1), (2, 5, 2), (3, 2, 1)])
def test_workers_divide_the_threads_of_torch(count: int, threads: int, each: int) -> None:
    before = torch.get_num_threads()
    weight = torch.ones(1, requires_grad=True)
    workers = Workers([weight], count, threads)
    told = workers.backward(lambda job: ((weight * job).sum(), torch.tensor(torch.get_num_threads())), [1, 2, 3, 4], lambda _: None)
    assert [int(one) for one in told] == [each] * 4
    assert torch.get_num_threads() == before
    assert weight.grad == 10
