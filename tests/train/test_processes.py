"""Several processes train what one would: DDP and FSDP2 over gloo, on CPUs."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import programs
from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.noise.hybrid import HybridNoise
from dlm.noise.masked import MaskedNoise
from dlm.train import state
from dlm.train.objective import RowsOf
from train import tiny

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")]
MUON = ("optimizer=muon", "conv=3", "weights=equal")
SLOW = "lr=0.001"  # Adam turns the rounding of a vanishing gradient into a step of this size


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    tiny.run(text, out, SLOW)
    return out


def together(text: Path, outs: list[Path], *settings: str, sharded: bool = False, stop: bool = False, **options: Any) -> list[int | None]:
    """Train in as many processes as there are directories; stop: interrupt the last one. Their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = (sharded, text)
    ranks = [programs.process(tiny.as_rank, rank, len(outs), port, *shared, out, settings, options) for rank, out in enumerate(outs)]
    for process in ranks:
        process.start()
    log = outs[0] / "log.jsonl"
    while stop and not (log.is_file() and len(log.read_text().splitlines()) > 2):
        assert ranks[-1].is_alive()
        time.sleep(0.001)
    if stop:
        assert ranks[-1].pid is not None
        os.kill(ranks[-1].pid, signal.SIGINT)
    for process in ranks:
        process.join(120)
        process.kill()
    return [process.exitcode for process in ranks]


def assert_close(a: Path, b: Path) -> None:
    """The same to the rounding of sums taken in another order, which Muon's steps enlarge."""
    for file in ("training.safetensors", "model.safetensors"):
        first, second = load_file(a / file), load_file(b / file)
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, atol=5e-5, rtol=0, msg=partial("{}: {}".format, name))
    for x, y in zip(tiny.curve(a), tiny.curve(b), strict=True):
        assert x == pytest.approx(y, rel=1e-4)


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_equal_one_and_only_the_first_writes(text: Path, alone: Path, tmp_path: Path, sharded: bool) -> None:
    assert together(text, [tmp_path / "first", tmp_path / "second"], SLOW, sharded=sharded) == [0, 0]
    assert_close(tmp_path / "first", alone)
    assert not (tmp_path / "second").exists()
    exported, saved = load_file(tmp_path / "first" / "model.safetensors"), tiny.tensors(tmp_path / "first")
    assert all(torch.equal(value, saved[f"ema.{name}"]) for name, value in exported.items())
    LanguageModel.from_pretrained(str(tmp_path / "first"))


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_resume_with_another_number_of_processes(text: Path, alone: Path, tmp_path: Path, sharded: bool) -> None:
    tiny.run(text, tmp_path / "grown", SLOW, stop_after=4)
    assert together(text, [tmp_path / "grown"] * 2, SLOW, sharded=sharded, resume=True) == [0, 0]
    assert_close(tmp_path / "grown", alone)
    assert together(text, [tmp_path / "shrunk"] * 2, SLOW, sharded=sharded, stop_after=7) == [0, 0]
    tiny.run(text, tmp_path / "shrunk", SLOW, resume=True)
    assert_close(tmp_path / "shrunk", alone)


def test_two_processes_with_muon_go_on_alone(text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "alone", SLOW, *MUON)
    assert together(text, [tmp_path / "shrunk"] * 2, SLOW, *MUON, sharded=True, stop_after=7) == [0, 0]
    tiny.run(text, tmp_path / "shrunk", SLOW, *MUON, resume=True)
    assert_close(tmp_path / "shrunk", tmp_path / "alone")


@pytest.mark.parametrize(
    ("sharded", "settings"),
    [
        # with seed 0, a gradient of zero but for rounding has another sign on some CPUs, and Adam takes a whole step by the sign
        (False, ("estimator=continuous", "noise_schedule=geometric", "time_conditioning=true", "seed=1")),
        (False, ("objective=autoregressive", "tied=true")),
        (True, ("objective=autoregressive", "tied=true")),
        (False, MUON),
        (True, MUON),
    ],
    ids=["DDP continuous", "DDP tied", "FSDP2 tied", "DDP Muon", "FSDP2 Muon"],
)
def test_other_objectives(text: Path, tmp_path: Path, sharded: bool, settings: tuple[str, ...]) -> None:
    tiny.run(text, tmp_path / "alone", SLOW, *settings)
    assert together(text, [tmp_path / "run"] * 2, SLOW, *settings, sharded=sharded) == [0, 0]
    assert_close(tmp_path / "run", tmp_path / "alone")


def test_an_interrupt_of_one_stops_all_at_the_same_step(text: Path, tmp_path: Path) -> None:
    settings = ("steps=3000", "save_every=3000", "eval_every=3000", "log_every=1")
    assert together(text, [tmp_path / "run"] * 2, *settings, stop=True) == [1, 1]
    step = state.read_meta(tmp_path / "run" / state.FILE)["step"]
    assert tiny.curve(tmp_path / "run")[-1]["step"] == step
    tiny.run(text, tmp_path / "run", f"steps={step + 1}", resume=True)


@pytest.mark.slow
def test_the_launcher_passes_an_interrupt_on(text: Path, tmp_path: Path) -> None:
    """A Ctrl-C reaches every process twice, from the terminal and from the launcher, and still there is a save."""
    out, settings = tmp_path / "run", ["steps=3000", "save_every=3000", "eval_every=3000", "log_every=1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [tiny.__file__, str(out), str(text), json.dumps(settings), "{}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        log = out / "log.jsonl"
        while not (log.is_file() and len(log.read_text().splitlines()) > 2):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=100)
    step = state.read_meta(out / state.FILE)["step"]
    assert tiny.curve(out)[-1]["step"] == step


def test_processes_that_do_not_know_of_each_other(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes that know nothing of each other"):
        tiny.run(text, tmp_path / "run")


def test_a_batch_that_does_not_divide(text: Path, tmp_path: Path) -> None:
    assert together(text, [tmp_path / "run"] * 2, "batch=5") == [1, 1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("plain", [MaskedNoise(9, 8), HybridNoise(9, 8)], ids=["masked", "hybrid"])
def test_rows_are_corrupted_as_in_the_whole_batch(plain: Any) -> None:
    x_BT, t_B = torch.arange(48).view(6, 8) % 8, torch.linspace(0.1, 0.9, 6)
    free_BT, count_B = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.8, torch.tensor([1, 2, 3, 1, 2, 3])

    def draw(noise: Any, rows: slice) -> list[torch.Tensor]:
        rng = torch.Generator().manual_seed(1)
        first = noise.corrupt_count(x_BT[rows], count_B[rows], free_BT[rows], rng)
        second = noise.corrupt(x_BT[rows], t_B[rows], rng)  # starts where the first ended
        return [*(first if isinstance(first, tuple) else (first,)), second]

    whole = draw(plain, slice(None))
    for ranks in (1, 2, 3):
        share = math.ceil(6 / ranks)
        for rank in range(ranks):
            own = slice(rank * share, (rank + 1) * share)
            noise = RowsOf(plain, batch=6, own=own)
            for part, expected in zip(draw(noise, own), whole, strict=True):
                assert torch.equal(part, expected[own])
