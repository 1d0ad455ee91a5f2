"""Shared fixtures: small checkpoints with random weights, so that every verb can be run in a second."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerator import gpu as gpu
from dlm import cli
from dlm.formats.native import ModelConfig
from dlm.language_model import LanguageModel
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.text.tokenizer import Tokenizer

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start: a worker of the suite has one core

ALPHABET = "\n !,.:ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def make_model(
    objective: str = "diffusion",
    *,
    noise: dict[str, Any] | None = None,
    window: int = 32,
    context: int = 8,
    alphabet: str = ALPHABET,
    tokenizer: Tokenizer | None = None,
    colours: tuple[str, ...] = (),
    **network: Any,
) -> LanguageModel:
    """A LanguageModel whose weights are random and far from the identity. noise: as in config.json; semantic gets clusters."""
    tokenizer = tokenizer or Tokenizer.characters(alphabet)
    noise = noise or {"process": "masked", "schedule": "linear"}
    if noise["process"] == "semantic":
        noise = {"clusters": [*(token % 5 for token in range(tokenizer.vocab_size)), 5]} | noise
    attention = "full" if objective == "diffusion" else "causal"
    sizes: dict[str, Any] = {"layers": 2, "heads": 2, "width": 32, "window": window, "attention": attention} | network
    config = TransformerConfig(vocab_size=tokenizer.vocab_size + 1, **sizes)
    network_ = Transformer(config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network_.parameters():
            parameter.normal_(0.0, 0.2, generator=rng)
    settings = ModelConfig(config, tokenizer.mask_id, objective, noise, context, colours=colours)
    name = noise["process"] if objective == "diffusion" else objective
    return LanguageModel(network_.eval().requires_grad_(False), settings, tokenizer, name=f"tiny-{name}")


@pytest.fixture(scope="session")
def masked_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny-masked"
    make_model().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def autoregressive_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny-ar"
    make_model("autoregressive").save_pretrained(path)
    return path


TEXT = "ROMEO: But soft, what light through yonder window breaks!\nJULIET: O Romeo, Romeo, wherefore art thou Romeo.\n" * 40


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dlm", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


class Dlm:
    """Runs verbs in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *words: str) -> tuple[int, str, str]:
        return run(self.capsys, self.monkeypatch, *words)

    def told(self, *words: str) -> str:
        """The one line that bad input gets."""
        code, out, err = self(*words)
        lines = [line for line in err.splitlines() if line.startswith("dlm: ")]
        assert code == 2, (words, code, out, err)
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]


@pytest.fixture
def dlm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Dlm:
    monkeypatch.chdir(tmp_path)
    return Dlm(capsys, monkeypatch)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first, so that with several processes nobody waits for it in the end."""
    items.sort(key=lambda item: "test_readme.py" not in item.nodeid)
