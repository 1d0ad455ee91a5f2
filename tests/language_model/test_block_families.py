"""The newer families as the others: rows alone and in a batch, padding, our samplers, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Dlm
from dlm.language_model import LanguageModel
from dlm.language_model.options import TextKeywords
from dlm.sampling.diffusion.loop import DiffusionRun, DiffusionSampler
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas
from test_open_models import ROWS

NEAR = 3e-5
FAMILIES = ("Nemotron-Labs-Diffusion", "Fast-dLLM v2", "I-DLM", "Open-dCoder", "DiffuLLaMA", "tiny-diffusion")
PROMPTS = [[5, 9, 33, 27, 3], [7, 12], [44, 61, 2, 70, 9, 9, 31, 40, 8]]


def model(family: str, tmp_path: Path) -> LanguageModel:
    return ROWS[family].load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_alone_and_in_a_batch(family: str, tmp_path: Path) -> None:
    lm = model(family, tmp_path)
    options: TextKeywords = {"max_new_tokens": 14, "steps": 14} if lm.is_diffusion else {"max_new_tokens": 14}
    together = lm.generate(PROMPTS, seed=3, **options)
    for row, prompt in enumerate(PROMPTS):
        (alone,) = lm.generate([prompt], seed=3 + row, **options)
        ids = alone.trajectory.current_BT[0].tolist()
        assert together[row].trajectory.current_BT[row][: len(ids)].tolist() == ids
        assert alone.sampler == lm.default_sampler


OURS = ["topk", "confidence:0.2", "entropy-bound:1", "ancestral", "first-hitting"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "I-DLM"])
@pytest.mark.parametrize("word", OURS)
def test_our_samplers(family: str, word: str, tmp_path: Path) -> None:
    """A row alone and beside another gives the same text, without the mask."""
    lm = model(family, tmp_path)
    options: TextKeywords = {"sampler": word, "steps": 6, "temperature": 0.5, "max_new_tokens": 12}
    together = lm.generate(PROMPTS[:2], seed=5, **options)
    for row, prompt in enumerate(PROMPTS[:2]):
        (alone,) = lm.generate([prompt], seed=5 + row, **options)
        ids = alone.trajectory.current_BT[0].tolist()
        assert together[row].trajectory.current_BT[row][: len(ids)].tolist() == ids
        stop = next((at for at, token in enumerate(ids[len(prompt) :]) if token in lm.stops), None)
        assert lm.tokenizer.mask_id not in ids[: None if stop is None else len(prompt) + stop]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_not_read(family: str, tmp_path: Path) -> None:
    lm = model(family, tmp_path)
    z_BT = torch.tensor([[*PROMPTS[0], 1, 1, 1], [*PROMPTS[2][:8]]])
    real_BT = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    how: dict[str, Any] = {"t": torch.tensor([3, 3])} if lm.config.network.time_conditioning else {}
    padded_BTV = lm.logits(z_BT, attention_mask=real_BT, **how)
    how = {name: t[:1] for name, t in how.items()}
    assert float((padded_BTV[0, :5] - lm.logits(z_BT[:1, :5], **how)[0]).abs().max()) < NEAR
    assert float((padded_BTV[1] - lm.logits(z_BT[1:], **how)[0]).abs().max()) < NEAR


NUMBERED = "17 3 99 5 60 "


LONG = "Nemotron-Labs-Diffusion"  # its window has 4,096 tokens


@pytest.mark.parametrize("family", [pytest.param(one, marks=[pytest.mark.slow] if one == LONG else []) for one in FAMILIES])
def test_generate_and_eval_from_the_command_line(family: str, dlm: Dlm, tmp_path: Path) -> None:
    row = ROWS[family]
    lm = row.load(tmp_path)
    directory = tmp_path / "model" if (tmp_path / "model").is_dir() else tmp_path / "llama"
    directory = directory if directory.is_dir() else Path(__file__).parents[1] / "golden" / row.golden
    forced = ["--family", row.record] if row.forced else []
    numbered = family == "Nemotron-Labs-Diffusion"
    code, out, err = dlm("generate", NUMBERED if numbered else "the", str(directory), "--max-new-tokens", "8", *forced)
    assert code == 0, err
    assert out.startswith(NUMBERED.strip() if numbered else "the")
    assert f", {lm.default_sampler}, seed 0" in err
    text = tmp_path / "text.txt"
    text.write_text((NUMBERED if numbered else "the nd an ou ") * (1700 if numbered else 300))
    options = ["--split", "all", "--passes", "2", "--max-windows", "1", "--card", str(tmp_path / "card.json"), "--json"]
    code, out, err = dlm("eval", str(directory), "--data", str(text), *options, *forced)
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    assert 0 < record["nats_per_token"] < 100
    assert record["is_bound"] == (family != "I-DLM")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "I-DLM"])
def test_rows_that_join(family: str, tmp_path: Path) -> None:
    """As in the server: a row that joins a run of another length writes what it writes alone."""
    lm = model(family, tmp_path)
    sampler = lm.sampler(steps=12)
    assert isinstance(sampler, DiffusionSampler)

    def begun(prompt: list[int], new: int) -> DiffusionRun:
        canvas = Canvas.from_rows([[*prompt, *[None] * new]], fill=lm.tokenizer.mask_id)
        return sampler.begin(canvas, rng=generators(0, 1))

    together = begun(PROMPTS[0], 12)
    together.step()
    together.join(begun(PROMPTS[2], 12))
    while bool(together.live_B.any()):
        frame = together.step()
    for row, prompt in enumerate((PROMPTS[0], PROMPTS[2])):
        alone = begun(prompt, 12)
        while bool(alone.live_B.any()):
            last = alone.step()
        assert frame.tokens_BT[row][: len(prompt) + 12].tolist() == last.tokens_BT[0].tolist()
