"""Threads of torch: asleep while they wait, and no more than the work is worth."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dlm as package
from conftest import Dlm, make_model
from dlm.inference import prepare
from dlm.inference.threads import threads_for, use_threads
from dlm.models.config import TransformerConfig
from dlm.models.meta import without_weights
from dlm.models.transformer import Transformer

SOURCE = str(Path(package.__file__).parents[1])


@pytest.fixture
def three() -> Iterator[None]:
    """Torch has three threads, until the test ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def network(width: int, layers: int) -> Transformer:
    return Transformer(TransformerConfig(66, window=256, layers=layers, heads=4, width=width))


@pytest.mark.parametrize(
    ("width", "layers", "positions", "threads"),
    [(192, 6, 256, 3), (192, 6, 64, 1), (192, 6, 1, 1), (192, 6, 4 * 64, 3), (96, 3, 256, 1), (768, 16, 1, 3)],
)
def test_one_thread_for_little_work(three: None, width: int, layers: int, positions: int, threads: int) -> None:
    """The bundled models by windows and by single tokens, a light one, and one of 110M parameters."""
    with without_weights():
        made = network(width, layers)
    assert threads_for(made, positions) == threads


def test_quantized_weights_count_too(three: None) -> None:
    made = make_model().network
    before = threads_for(made, 10**5)
    assert before == 3
    prepare(made, bits=8)
    assert threads_for(made, 10**5) == before


def test_the_largest_of_several_decides_and_what_is_asked_for_holds(three: None) -> None:
    small, large = network(96, 3), network(192, 6)
    use_threads(0, [])
    assert torch.get_num_threads() == 3
    use_threads(0, [(small, 256), (large, 256)])
    assert torch.get_num_threads() == 3
    use_threads(2, [(small, 256)])
    assert torch.get_num_threads() == 2
    use_threads(0, [(small, 256)])
    assert torch.get_num_threads() == 1


def test_the_option_of_generate(dlm: Dlm, three: None, masked_dir: Path) -> None:
    words = ("generate", "--model", str(masked_dir), "--length", "8", "--steps", "2")
    _, many, _ = dlm(*words, "--threads", "2")
    assert torch.get_num_threads() == 2
    _, one, _ = dlm(*words)
    assert torch.get_num_threads() == 1
    assert many == one != ""


@pytest.mark.parametrize("verb", ["generate", "chat", "serve", "train"])
def test_every_verb_refuses_less_than_none(dlm: Dlm, verb: str) -> None:
    assert "'--threads': must be at least 0, got -1" in dlm.told(verb, "--threads", "-1")


def openmp(code: str, **environment: str) -> str:
    """The settings that GNU's OpenMP says it has read."""
    known = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    known |= {"PYTHONPATH": SOURCE, "OMP_DISPLAY_ENV": "VERBOSE"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=known, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch has another OpenMP here")
    return done.stderr


@pytest.mark.slow
def test_threads_sleep_while_they_wait() -> None:
    assert "GOMP_SPINCOUNT = '0'" in openmp("import dlm, torch")
    assert "GOMP_SPINCOUNT = '0'" not in openmp("import torch, dlm")  # too late: OpenMP has read its settings
    assert "GOMP_SPINCOUNT = '0'" not in openmp("import dlm, torch", OMP_WAIT_POLICY="ACTIVE")
