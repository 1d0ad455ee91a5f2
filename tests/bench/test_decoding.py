"""`dlm bench decode`: the figures of a run are those of the run."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from conftest import Dlm, make_model
from dlm.bench import decoding
from dlm.cli import bench
from dlm.language_model import LanguageModel
from dlm.sampling.autoregressive.drafters import DraftModel
from dlm.sampling.autoregressive.plain import AutoregressiveSampler
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder


def left_to_right(model: LanguageModel, temperature: float | None = None) -> AutoregressiveSampler:
    sampler = model.sampler(temperature=temperature)
    assert isinstance(sampler, AutoregressiveSampler)
    return sampler


def test_a_draft_of_itself_is_always_accepted() -> None:
    model = make_model("autoregressive", window=32, context=0)
    network = model.network
    draft = DraftModel(network, network.ragged_cache, model.config.start_token_id)
    canvas = model.canvas(["ROMEO", "What,"], max_new_tokens=13)
    strided = SpeculativeDecoder(network, model.tokenizer.mask_id, 32, network.ragged_cache, draft, stride=4)
    plain, fast = decoding.compare({"plain": left_to_right(model), "draft": strided}, canvas, seed=3, rounds=2)
    assert plain.same
    assert fast.same
    assert plain.tokens == fast.tokens == 26
    assert plain.per_pass == 1
    assert fast.accepted == [1.0, 1.0, 1.0]
    assert fast.calls == 4  # one call without proposals, then four tokens each
    assert 0 < fast.first <= fast.seconds


def test_another_text_is_told() -> None:
    model = make_model("autoregressive", window=32, context=0)
    canvas = model.canvas(["ROMEO"], max_new_tokens=20)
    words = {"plain": left_to_right(model, 1.0), "cold": left_to_right(model, 0.0)}
    assert [one.same for one in decoding.compare(words, canvas, rounds=1)] == [True, False]


class Starting:
    """An engine whose first run takes long, as one that compiles."""

    rows, start = 0, [0]

    def __init__(self) -> None:
        self.runs = 0

    def write(self, prompts: Sequence[list[int]], new: int) -> tuple[list[list[int]], float]:
        self.runs += 1
        time.sleep(0.3 if self.runs == 1 else 0.0)
        return [[1] * new for _ in prompts], 0.0

    def weights(self) -> int:
        return 0


def test_the_first_run_is_not_timed() -> None:
    model, engine = make_model("autoregressive", window=32, context=0), Starting()
    told: list[int] = []
    canvases = [model.canvas(["ROMEO"], max_new_tokens=4), model.canvas(["JULIET"], max_new_tokens=4)]
    (found,) = decoding.compare({"engine": engine}, canvases, rounds=1, progress=told.append)
    assert found.seconds < 0.2
    assert engine.runs == 3
    assert sum(told) == decoding.runs(1, 2, 1) == 3


@pytest.mark.parametrize("width", [160, 120])
def test_many_draft_tokens_leave_room_for_the_speed(width: int) -> None:
    rows = [
        decoding.Decoding(name, batch, 512 * batch, 90, 41.5, 0.1, accepted, True, memory=538_000_000)
        for name, accepted in (("autoregressive", []), ("draft:int4:24", [0.91 - k / 100 for k in range(23)]))
        for batch in (1, 4)
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(bench._table(rows, [1, 4]))
    line = next(line for line in console.export_text().splitlines() if "draft:int4:24" in line)
    assert "0.91 0.90 .. 0.69 (23)" in line
    assert line.rstrip().endswith("12.3 (1.00x)  49.3 (1.00x)")


def test_top_k_of_the_verb(dlm: Dlm, autoregressive_dir: Path) -> None:
    Path("prompts.txt").write_text("ROMEO:\n")
    words = ("bench", "decode", str(autoregressive_dir), "--max-new-tokens", "4", "--rounds", "1", "--prompts", "prompts.txt")
    code, out, err = dlm(*words, "--batch", "1", "--methods", "lookup:3", "--top-k", "2", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["top_k"] == 2
    assert all(row["same"] for row in found["rows"])


def test_the_verb(dlm: Dlm, autoregressive_dir: Path, masked_dir: Path) -> None:
    Path("prompts.txt").write_text("ROMEO:\nBut soft\n")
    base = ("bench", "decode", str(autoregressive_dir), "--max-new-tokens", "8", "--rounds", "1", "--prompts", "prompts.txt")
    code, out, err = dlm(*base, "--methods", f"lookup:3,strided:3,draft:{autoregressive_dir}:3", "--batch", "1,2", "--json")
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert len(rows) == 8
    assert all(row["same"] for row in rows)
    assert [row["tokens"] for row in rows] == [8] * 4 + [16] * 4
    for row in rows:
        assert row["tokens_per_forward"] == pytest.approx(row["tokens"] / row["batch"] / row["calls"])
    assert next(row for row in rows if row["method"].startswith("draft"))["accepted"] == [1.0, 1.0]
    told = json.loads(dlm(*base, "--methods", "ar,ngram,draft,isd", "--batch", "1", "--json")[1].splitlines()[-1])["rows"]
    assert [row["method"] for row in told] == ["autoregressive", "lookup:4", "draft:int4:24", "strided:4"]
    assert all(row["same"] for row in told)
    told = json.loads(dlm(*base, "--methods", "draft", "--batch", "1", "--dtype", "float32,int4", "--json")[1].splitlines()[-1])["rows"]
    assert [row["method"] for row in told] == ["autoregressive", "draft:int4:24", "autoregressive int4"]
    assert "has no heads" in dlm.told(*base, "--methods", "ar,mtp")
    assert "is a diffusion model" in dlm.told("bench", "decode", str(masked_dir))
    assert "--batch is one or more numbers" in dlm.told(*base, "--batch", "1,x")
    assert "no prompts at nowhere" in dlm.told(*base[:7], "--prompts", "nowhere")
    assert torch.is_grad_enabled()
