"""Checkpoints and prompts that cannot be used get one line that says what to do, and exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Dlm

GOLDEN = Path(__file__).parents[1] / "golden"


def config(**changes: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        data = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return spoil


def quantized(method: str, **more: Any) -> Callable[[Path], None]:
    return config(quantization_config={"quant_method": method}, **more)


def shards(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def no_mask(directory: Path) -> None:
    data = json.loads((directory / "tokenizer.json").read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<|mask|>"]
    (directory / "tokenizer.json").write_text(json.dumps(data))


def mask_as_text(directory: Path) -> None:
    data = json.loads((directory / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] &= token["content"] != "<|mdm_mask|>"
    (directory / "tokenizer.json").write_text(json.dumps(data))


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"model": torch.nn.Linear(2, 2)}, directory / "weights.pt")


def half_a_file(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def nothing(_directory: Path) -> None:
    """The checkpoint is as it should be."""


LONG = "the " * 300
Case = tuple[str, Callable[[Path], None], list[str], str]
CASES: dict[str, Case] = {
    "an unknown architecture": ("dream", config(architectures=["Novel"], auto_map=None), ["the"], "Known: LLaDAModelLM, DreamModel"),
    "one that runs its own code": ("dream", config(architectures=["Novel"]), ["the"], "which dlm never runs"),
    "bitsandbytes": ("llada", quantized("bitsandbytes"), ["the"], "quantized by bitsandbytes, which dlm does not read"),
    "AWQ": ("a2d_qwen2", quantized("awq"), ["the"], "quantized by awq, which dlm does not read"),
    "GPTQ": ("nemotron_labs_diffusion", quantized("gptq"), ["7"], "quantized by gptq, which dlm does not read"),
    "AWQ of a family by name": (
        "a2d_qwen2",
        quantized("awq"),
        ["the", "--family", "open-dcoder"],
        "quantized by awq, which dlm does not read",
    ),
    "GPTQ of a plain base": (
        "a2d_qwen2",
        quantized("gptq", model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        ["the"],
        "with quantized weights: take the unquantized one",
    ),
    "a missing shard": ("llada", shards, ["the"], "lacks model-00002-of-00002.safetensors: the checkpoint is not whole"),
    "half a file": ("llada", half_a_file, ["the"], "truncated or damaged"),
    "no mask token": ("a2d_qwen3", no_mask, ["the"], "its tokenizer lacks the mask token <|mask|>"),
    "a mask beyond the tokenizer": ("llada", config(mask_token_id=280), ["the"], "puts the mask at 280"),
    "a prompt beyond the window": ("a2d_qwen3", nothing, [LONG], "tokens, the window 256 and no context: use at most 255"),
    "more new tokens than the window holds": ("a2d_qwen3", nothing, ["the", "--max-new-tokens", "256"], "ask for at most 255 new ones"),
    "a prompt that holds the mask": ("llada", mask_as_text, ["fill <|mdm_mask|> in"], "the text spells the mask '<|mdm_mask|>'"),
    "a prompt of tiny-diffusion that holds it": ("tiny_diffusion", nothing, ["a\0b"], "spells the mask"),
    "words without a tokenizer": ("nemotron_labs_diffusion", nothing, ["the"], "this model has no tokenizer"),
    "code in a pickled file": ("tiny_diffusion", pickled, ["the"], "holds more than tensors, which dlm never unpickles"),
    "an unknown family": ("llada", nothing, ["the", "--family", "lada"], "did you mean llada?"),
    "a preset of ours": ("llada", nothing, ["the", "--preset", "fast"], "unknown preset 'fast'"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case: str, dlm: Dlm, tmp_path: Path) -> None:
    name, spoil, arguments, message = CASES[case]
    directory = tmp_path / name
    shutil.copytree(GOLDEN / name, directory)
    spoil(directory)
    prompt, *options = arguments
    code, out, err = dlm("generate", prompt, str(directory), *options)
    assert code == 2
    assert out == ""
    assert err.startswith("dlm: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_same_for_a_mask_that_a_gguf_file_states(tmp_path: Path, dlm: Dlm) -> None:
    from formats.test_gguf_diffusion import write

    file = write("llada", tmp_path / "llada.gguf", mask=500)
    code, _, err = dlm("generate", "the", str(file))
    assert code == 2
    assert "tokenizer.ggml.mask_token_id puts the mask at 500" in err
    assert "config.json" not in err
