"""Every cell of README's table of open models is what a check of a small checkpoint finds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bases import publish, transformer
from dlm.errors import InputError
from dlm.formats import bridge as bridges
from dlm.formats import gguf
from dlm.formats.families.known import FAMILIES
from dlm.language_model import LanguageModel, load
from dlm.models.canvas import CanvasNetwork, ReadText
from dlm.workflows.evaluate import evaluate
from dlm.workflows.export import export
from dlm.workflows.inputs import Text, utf8_bytes
from dlm.workflows.verify import verify
from formats import test_by_hand as by_hand
from formats import test_experts as experts
from formats import test_gguf_diffusion as files
from formats import test_gguf_experts as gguf_experts

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
COLUMNS = ("family", "loads", "reference sampler", "KV cache", "GGUF", "bound")
NEAR = 3e-5


@dataclass(frozen=True)
class Row:
    """golden: the directory of a checkpoint and of its numbers; logits: their name there. family: forced. make: another directory.
    bridge: to a class of another library, in place of a network of ours."""

    record: str
    golden: str
    logits: str = "logits"
    forced: bool = False
    make: Callable[[Path], Path] | None = None
    gguf: Callable[[Path], Path] | None = None
    bridge: str = ""

    def load(self, tmp_path: Path) -> LanguageModel:
        directory = self.make(tmp_path) if self.make is not None else GOLDEN / self.golden
        return load(str(directory), family=self.record if self.forced else "", bridge=self.bridge)


def diffullama(tmp_path: Path) -> Path:
    """A Llama whose mask config.json states."""
    directory = publish(transformer("Llama"), tmp_path / "llama")
    data = json.loads((directory / "config.json").read_text()) | {"mask_token_id": 11}
    (directory / "config.json").write_text(json.dumps(data))
    return directory


def plain(name: str, arch: str = "") -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        return files.write(name, tmp_path / "tiny.gguf", **({"arch": arch} if arch else {}))

    return make


ROWS = {
    "LLaDA": Row("llada", "llada", gguf=plain("llada")),
    "Dream": Row("dream", "dream", gguf=plain("dream")),
    "a2d of dllm": Row("a2d-qwen3", "a2d_qwen3"),
    "SDAR": Row("sdar", "sdar", "block_causal_4_logits"),
    "LLaDA-MoE": Row("llada-moe", "llada_moe", gguf=lambda tmp_path: gguf_experts.write(tmp_path / "tiny.gguf")),
    "LLaDA2": Row("llada2", "llada2_moe", "full_logits"),
    "Nemotron-Labs-Diffusion": Row("nemotron-labs-diffusion", "nemotron_labs_diffusion", "full_logits"),
    "Fast-dLLM v2": Row("fast-dllm-v2", "", make=by_hand.fast_dllm),
    "I-DLM": Row("i-dlm", "sdar", "causal_logits", forced=True, gguf=plain("sdar", "qwen3")),
    "Open-dCoder": Row("open-dcoder", "a2d_qwen2", forced=True, make=by_hand.qwen2, gguf=plain("a2d_qwen2", "qwen2")),
    "DiffuLLaMA": Row("diffullama", "", forced=True, make=diffullama),
    "tiny-diffusion": Row("tiny-diffusion", "tiny_diffusion"),
    "MDLM": Row("mdlm", "mdlm"),
    "BD3-LM": Row("bd3lm", "bd3lm", "training_logits_of_the_noisy_half"),
    "SEDD": Row("sedd", "sedd", "log_score"),
    "DUO": Row("duo", "duo"),
    "GIDD": Row("gidd", "gidd"),
    "DiffusionGemma, by `--bridge transformers`": Row("diffusion_gemma", "diffusion_gemma", bridge="transformers"),
}


def table() -> dict[str, dict[str, str]]:
    """The cells by family and column."""
    part = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Open models\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    head, _, *rows = lines
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


CELLS = [(family, column) for family in ROWS for column in COLUMNS[1:]]


def loads(row: Row, tmp_path: Path) -> str:
    """`yes` where the logits are those of the reference."""
    if not row.golden or row.make is not None:  # the oracle is transformers with the mask of the family
        TOLD[row.record](tmp_path / "other")
        return "yes"
    lm, path = row.load(tmp_path), GOLDEN / row.golden / "golden.safetensors"
    numbers = load_file(path)
    if row.bridge:
        both_BT = torch.cat([numbers["prompt_ids"], numbers["canvas_ids"]], 1)
        assert float((lm.logits(both_BT) - numbers["logits"]).abs().max()) < NEAR
        return "yes"
    if row.logits not in ("logits", "log_score", "training_logits_of_the_noisy_half"):
        assert float((lm.logits(numbers["input_ids"]) - numbers[row.logits]).abs().max()) < NEAR
        return "yes"
    assert verify(lm, path).differ == []
    return "yes"


TOLD: Mapping[str, Callable[[Path], None]] = {
    "fast-dllm-v2": by_hand.test_fast_dllm_is_read_block_by_block_and_shifted,
    "open-dcoder": by_hand.test_open_dcoder_is_read_fully_and_shifted,
    "diffullama": by_hand.test_diffullama_is_read_fully_shifted_and_its_mask_is_a_token,
}
LOOPS: Mapping[str, Callable[[Path], None]] = {  # without golden ids: a plain loop, written as the reference's, is compared
    "fast-dllm-v2": by_hand.test_fast_dllm_writes_what_a_plain_loop_writes,
    "open-dcoder": by_hand.test_p2_writes_what_a_plain_loop_writes,
    "llada-moe": experts.test_llada_moe_writes_what_a_plain_loop_writes,
    "i-dlm": by_hand.test_i_dlm_is_sdar_read_causally,
}


def sampler(row: Row, tmp_path: Path) -> str:
    """`equal` where ids are compared, `random` where there are none to compare and two seeds differ."""
    if row.record in LOOPS:
        LOOPS[row.record](tmp_path / "other")
        return "equal"
    cases = GOLDEN / row.golden / "generations.json"
    lm = row.load(tmp_path)
    if row.bridge:
        return as_the_library_writes(lm)
    if row.golden and cases.is_file():
        assert verify(lm, cases).differ == []
        return "equal"
    first, second = (lm.generate([[1, 2, 3]], max_new_tokens=24, seed=seed)[0].trajectory.current_BT for seed in (0, 9))
    assert not torch.equal(first, second)
    return "random"


def as_the_library_writes(lm: LanguageModel) -> str:
    """`equal` where the library's own `generate`, given the random numbers of ours, writes the same ids."""
    from formats.test_bridge import reference

    (ours,) = lm.generate([[3, 4, 5, 90]], max_new_tokens=8, seed=5)
    with pytest.MonkeyPatch.context() as patch:  # of its sources of random numbers
        ids, _ = reference(lm, [3, 4, 5, 90], 8, 5, patch)
    assert ours.trajectory.current_BT[0, 4:].tolist() == ids[:8]
    return "equal"


def read_once(lm: LanguageModel, golden: str) -> str:
    """`exact` where a text that is read in parts, each once, leaves the logits of the canvas after it as they are."""
    numbers = load_file(GOLDEN / golden / "golden.safetensors")
    assert isinstance(lm.network, CanvasNetwork)
    text = ReadText(lm.network)
    text.add(numbers["prompt_ids"][:, :4])
    text.add(numbers["prompt_ids"][:, 4:])
    assert float((text.logits(numbers["canvas_ids"]) - numbers["logits"]).abs().max()) < NEAR
    return "exact"


def cache(row: Row, tmp_path: Path) -> str:
    """`approximate`: --cache works; `exact`: there is one, and the text is that without it; `no`: it is refused."""
    lm = row.load(tmp_path)
    if row.bridge:
        return read_once(lm, row.golden)
    word = {"masked": "topk", "replacement": "ancestral", None: "autoregressive"}[lm.kind]
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "sampler": word} | ({"steps": 12} if lm.is_diffusion else {})
    prompt = [[1, 2, 3, 4, 5]]
    try:
        lm.generate(prompt, cache="dual", **options)
    except InputError:
        pass
    else:
        return "approximate"
    if lm.is_diffusion and getattr(lm.sampler(sampler=word), "cache", None) is None:
        return "no"
    with_cache, without = (lm.generate(prompt, cache=how, **options)[0].trajectory.current_BT for how in (True, False))
    assert torch.equal(with_cache, without)
    return "exact"


def as_gguf(row: Row, tmp_path: Path) -> str:
    """`yes`: a GGUF file of its weights has its logits; `no`: neither llama.cpp's architectures nor a plain one stand for it."""
    if row.bridge:
        with pytest.raises(InputError, match="is a network of transformers"):
            export(row.load(tmp_path), tmp_path / "out.gguf", to="gguf")
        assert row.record not in gguf.DIFFUSION
        return "no"
    record = next(family for family in FAMILIES if family.name == row.record)
    if row.gguf is None and row.make is None:
        assert record.name not in gguf.DIFFUSION
        assert not record.base
        return "no"
    if row.gguf is None and record.base:  # one of its base, which a file of another architecture is told from
        with pytest.raises(InputError, match=f"is one of a {record.base} file"):
            load(str(plain("sdar", "qwen3")(tmp_path)), family=record.name)
        return "yes"
    if row.gguf is None:
        return "no"
    lm, numbers = (
        load(str(row.gguf(tmp_path)), family=row.record if row.forced else ""),
        load_file(GOLDEN / row.golden / "golden.safetensors"),
    )
    assert float((lm.logits(numbers["input_ids"]) - numbers[row.logits]).abs().max()) < NEAR
    return "yes"


def spelt_bytes(lm: LanguageModel, text: Path, windows: int) -> int:
    """Of the windows that are measured, spread over the text."""
    read = Text.read(lm, text, split="all", max_windows=windows)
    return utf8_bytes(lm.tokenizer.spelling, read.windows_WT)


def bound(row: Row, tmp_path: Path) -> str:
    """`yes` for a finite bound with its error, `exact` for a likelihood, `no` where none is known."""
    lm = row.load(tmp_path)
    if row.bridge:
        with pytest.raises(InputError, match="no bound of it is known"):
            lm.predict(torch.zeros(1, 12, dtype=torch.long), torch.ones(1))
        return "no"
    if lm.window > 512:  # the same network, read in windows that a test has time for
        lm.network.config = lm.network.config.with_(window=64)
        lm.config = type(lm.config)(**{**lm.config.__dict__, "network": lm.network.config})
    text = tmp_path / "text.txt"
    ids = torch.randint(1, 100, (3 * lm.window,), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text(lm.tokenizer.decode([i for i in ids if i != lm.tokenizer.mask_id]), encoding="utf-8")
    found = evaluate(lm, text, split="all", passes=2, max_windows=2, card=None)
    assert 0 < found.nats_per_token < 100
    assert (found.stderr > 0) == found.is_bound
    assert found.stderr < found.nats_per_token
    assert found.samples == (2 if found.is_bound else 1)
    assert found.estimator
    assert found.bits_per_byte == pytest.approx(found.nats_per_token / math.log(2) * found.tokens / spelt_bytes(lm, text, found.windows))
    return "yes" if found.is_bound else "exact"


CHECKS: Mapping[str, Callable[[Row, Path], str]] = {
    "loads": loads,
    "reference sampler": sampler,
    "KV cache": cache,
    "GGUF": as_gguf,
    "bound": bound,
}


def test_the_table_has_a_row_for_every_family() -> None:
    assert list(table()) == list(ROWS)
    assert next(iter(table().values())).keys() == set(COLUMNS)
    several = {"a2d-qwen2", "a2d-llama"}  # members of the row of a2d
    assert {family.name for family in FAMILIES} == {row.record for row in ROWS.values() if not row.bridge} | several
    assert [row.bridge for row in ROWS.values() if row.bridge] == list(bridges.BRIDGES) * len(bridges.CLASSES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, which transformers asks about its steps
@pytest.mark.parametrize(("family", "column"), CELLS, ids=[f"{family}: {column}" for family, column in CELLS])
def test_a_cell_is_what_its_check_finds(family: str, column: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert CHECKS[column](ROWS[family], tmp_path) == table()[family][column]
