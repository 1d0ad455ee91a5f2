"""Bits per character count the characters of the text once, and say which tokens have no condition (report D17)."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from conftest import Dlm
from dlm.formats.native import ModelConfig
from dlm.language_model import LanguageModel
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.text.tokenizer import Tokenizer
from dlm.workflows.evaluate import evaluate
from dlm.workflows.inputs import Text, characters, utf8_bytes
from kinds import kinds

CHINESE = [chr(0x5929 + k) for k in range(40)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "zh.txt"
    path.write_text("".join(random.Random(0).choices(CHINESE, k=600)), encoding="utf-8")
    return path


def of_bytes(start: int | None = -1) -> LanguageModel:
    """An autoregressive model of bytes. start: its start token, -1 the mask, None none."""
    tokenizer = Tokenizer.bytes()
    network = TransformerConfig(tokenizer.ids, 16, 1, 2, width=16, attention="causal")
    torch.manual_seed(0)
    noise = {"process": "masked", "schedule": "linear"}
    settings = ModelConfig(network, tokenizer.mask_id, "autoregressive", noise, 4, start_token_id=start)
    return LanguageModel(Transformer(network).eval().requires_grad_(False), settings, tokenizer)


@pytest.mark.parametrize("window", [2, 5, 7, 9, 16])
def test_d17_a_character_that_a_window_cuts_counts_once(text: Path, window: int) -> None:
    lm = of_bytes()
    found = evaluate(lm, text, split="all", window=window)
    assert found.tokens == 1800 // window * window
    assert abs(found.characters - found.tokens / 3) <= 1
    assert found.bits_per_char == pytest.approx(found.nats_per_token * found.tokens / math.log(2) / found.characters)
    whole = Text.read(lm, text, split="all", window=window).windows_WT
    assert sum(characters(lm.tokenizer.spelling, row[None]) for row in whole) == found.characters  # adds up over windows


@pytest.mark.parametrize("name", [name for name in kinds() if name not in ("words", "numbers")])
def test_characters_are_those_of_the_text_for_every_tokenizer(name: str) -> None:
    tokenizer, written = kinds()[name], "ROMEO: the light breaks. " + ("天地🙂" if "sentencepiece" not in name else "soft")
    ids = tokenizer.encode(written)
    assert abs(characters(tokenizer.spelling, torch.tensor([ids])) - len(written)) <= 1  # some put a space before a text


def test_tokens_without_a_condition_are_told(dlm: Dlm, text: Path, tmp_path: Path) -> None:
    lm = of_bytes(None)
    found = evaluate(lm, text, split="all", window=8)
    windows_WT = Text.read(lm, text, split="all", window=8).windows_WT
    logits_WTV = lm.network(windows_WT[:, :-1]).double()
    logits_WTV[..., lm.tokenizer.mask_id] = -torch.inf
    nats = torch.nn.functional.cross_entropy(logits_WTV.transpose(1, 2), windows_WT[:, 1:])
    assert found.nats_per_predicted_token == pytest.approx(float(nats), abs=1e-5)
    assert evaluate(of_bytes(), text, split="all").nats_per_predicted_token is None
    lm.save_pretrained(tmp_path / "base")
    code, out, err = dlm("eval", str(tmp_path / "base"), "--data", str(text), "--split", "all", "--window", "8", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["nats_per_predicted_token"] == pytest.approx(found.nats_per_predicted_token)
    assert "the first token of a window has no condition" in " ".join(err.split())


@pytest.mark.parametrize("name", [name for name in kinds() if name not in ("words", "numbers")])
def test_bytes_are_those_of_the_text_for_every_tokenizer(name: str) -> None:
    tokenizer, written = kinds()[name], "ROMEO: the light breaks. " + ("天地🙂" if "sentencepiece" not in name else "soft")
    ids = tokenizer.encode(written)
    assert abs(utf8_bytes(tokenizer.spelling, torch.tensor([ids])) - len(written.encode())) <= 1  # some put a space before a text
