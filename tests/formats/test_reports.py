"""Checkpoints of public bug reports of other tools, whose keys were skipped in silence: the logits of transformers, or one line.

D1 vllm-project/vllm#39514; D2 ggml-org/llama.cpp PR #20746; D3 huggingface/transformers#33783; D4 ggml-org/llama.cpp PR #2772;
D5 ggml-org/llama.cpp PR #8676.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dlm
from bases import publish, transformer
from conftest import run
from dlm.errors import InputError
from dlm.language_model import load
from formats.test_gguf import write

NEAR = 1e-4
THETA = 10_000.0


def patched(directory: Path, **changes: Any) -> Path:
    """The directory with these keys in its config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def gap(path: Path, model: Any = None) -> float:
    """The largest difference between our logits and those of transformers, of the directory itself unless told otherwise."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval() if model is None else model
    z_BT = torch.randint(theirs.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BTV = theirs(z_BT).logits
    return float((load(str(path)).network(z_BT)[..., : expected_BTV.shape[-1]] - expected_BTV).abs().max())


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_d1_sliding_windows_by_layer(tmp_path: Path, family: str) -> None:
    """`layer_types` decides, whatever `max_window_layers` says."""
    directory = publish(transformer(family), tmp_path)
    slides = {"use_sliding_window": True, "sliding_window": 8}
    patched(directory, **slides, max_window_layers=2, layer_types=["sliding_attention", "full_attention"])
    assert gap(directory) < NEAR
    assert load(str(directory)).config.network.sliding_layers == (0,)
    patched(directory, layer_types=None, max_window_layers=0)
    assert gap(directory) < NEAR
    assert load(str(directory)).config.network.sliding_layers == (0, 1)
    patched(directory, layer_types=["full_attention"] * 2, max_window_layers=0)
    assert gap(directory) < NEAR
    patched(directory, layer_types=["chunked_attention"] * 2)
    assert "layer_types" in refused(directory)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_d2_bidirectional_decoders(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformer(family)
    directory = patched(publish(model, tmp_path / "both"), is_causal=False)
    assert "is_causal = False makes it no autoregressive model" in refused(directory)
    code, out, err = run(capsys, monkeypatch, "generate", "ROMEO:", str(directory), "--max-new-tokens", "3")
    assert (code, out) == (2, "")
    assert "is_causal" in err
    twin = write(model, tmp_path / "both.gguf", metadata={"attention.causal": False})
    assert "is_causal = False" in refused(twin)
    assert gap(write(model, tmp_path / "left.gguf", metadata={"attention.causal": True}), model) < NEAR


def test_d3_rope_scaling_beside_rope_parameters(tmp_path: Path) -> None:
    """transformers takes the older entry alone, a merge takes neither as it was meant: one line asks to keep one."""
    directory = publish(transformer("Qwen3"), tmp_path)
    for scaling in ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, {"rope_type": "linear", "factor": 4.0}):
        patched(directory, rope_scaling=scaling)
        assert "contradict each other" in refused(directory)
    old = patched(directory, rope_scaling=scaling, rope_parameters=None)
    assert gap(old) < NEAR
    assert gap(patched(old, rope_parameters=scaling | {"rope_theta": THETA})) < NEAR


def test_d3_the_former_window_of_the_top_level_wins(tmp_path: Path) -> None:
    inside = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    inside |= {"original_max_position_embeddings": 32, "rope_theta": THETA}
    directory = publish(transformer("Llama", rope_parameters=inside), tmp_path)
    assert gap(directory) < NEAR
    assert gap(patched(directory, original_max_position_embeddings=16)) < NEAR


SCALES: dict[str, dict[str, Any]] = {
    "the older key": {"rope.scale_linear": 4.0},
    "no type": {"rope.scaling.factor": 4.0},
    "a type": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "both": {"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0},
}


@pytest.mark.parametrize("scale", SCALES)
def test_d4_the_linear_scale_of_a_file(tmp_path: Path, scale: str) -> None:
    model = transformer("Llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": THETA})
    assert gap(write(model, tmp_path / "a.gguf", metadata=SCALES[scale]), model) < NEAR


def test_d4_a_scale_that_changes_nothing(tmp_path: Path) -> None:
    model = transformer("Llama")
    for scale in ({"rope.scaling.factor": 1.0}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope.scale_linear": 0.0}):
        assert gap(write(model, tmp_path / "a.gguf", metadata=scale), model) < NEAR
    assert "rope.dimension_count = 4 is not supported" in refused(write(model, tmp_path / "b.gguf", metadata={"rope.dimension_count": 4}))


def test_d4_yarn_of_a_file(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": THETA}
    model = transformer("Qwen2", rope_parameters=yarn)
    scale = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    assert gap(write(model, tmp_path / "a.gguf", metadata=scale), model) < NEAR


def test_d5_factors_of_a_file_one_by_one(tmp_path: Path) -> None:
    """Of llama3 with a former window of 64 positions, in place of the 8192 of the released models; and with a linear scale on top."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = transformer("Llama", head_dim=16, rope_parameters=llama3 | {"original_max_position_embeddings": 64, "rope_theta": THETA})
    plain_K = THETA ** (-torch.arange(0, 16, 2) / 16)
    kept_K = ((64 * plain_K / (2 * math.pi) - 1.0) / 3.0).clamp(0, 1)
    factors = {"rope_freqs.weight": 1 / (kept_K + (1 - kept_K) / 8.0)}
    assert gap(write(model, tmp_path / "a.gguf", tensors=factors), model) < NEAR
    model.model.rotary_emb.inv_freq /= 2
    scale = {"rope.scaling.factor": 2.0}
    assert gap(write(model, tmp_path / "b.gguf", tensors=factors, metadata=scale), model) < NEAR
    short = {"rope_freqs.weight": factors["rope_freqs.weight"][:4]}
    assert "LongRoPE has 8 factors" in refused(write(model, tmp_path / "c.gguf", tensors=short))
    other = {"blk.0.rope_freqs.weight": factors["rope_freqs.weight"]}
    assert "has a tensor blk.0.rope_freqs.weight" in refused(write(model, tmp_path / "d.gguf", tensors=other))
    qwen2 = write(transformer("Qwen2"), tmp_path / "e.gguf", tensors={"rope_freqs.weight": torch.ones(4)})
    assert "has a tensor rope_freqs.weight" in refused(qwen2)


@pytest.mark.parametrize("layers", [["sliding_attention", "full_attention"], ["full_attention", "sliding_attention"]])
def test_d1_sliding_windows_with_caches(tmp_path: Path, layers: list[str]) -> None:
    """Greedy texts of several lengths, by KV cache, without, by draft tokens, and in one batch: those of transformers."""
    model = transformer("Qwen3", use_sliding_window=True, sliding_window=5, layer_types=layers, seed=3)
    lm = load(str(publish(model, tmp_path)))
    lm.defaults["eos_token_id"] = []
    prompts = ["ROMEO:", "what light through", "a"]
    for prompt, *made in zip(prompts, *(lm.generate(prompts, temperature=0.0, max_new_tokens=20, **how) for how in HOW), strict=True):
        head = torch.tensor([lm.tokenizer.encode(prompt)])
        free = model.generate(head, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, head.shape[1] :].tolist()
        assert [one.text for one in made] == [prompt + lm.tokenizer.decode(free)] * len(HOW)
    steady = load(str(tmp_path), deterministic=True)
    steady.defaults["eos_token_id"] = []
    assert [one.text for one in steady.generate(prompts, temperature=0.0, max_new_tokens=20)] == [
        one.text for one in lm.generate(prompts, temperature=0.0, max_new_tokens=20)
    ]
    with pytest.raises(InputError, match="slides in some layers is not compiled"):
        load(str(tmp_path), compile=True)
    with pytest.raises(InputError, match="no GGUF architecture has attention that slides"):
        dlm.export(lm, tmp_path / "tiny.gguf", to="gguf")
    with pytest.raises(InputError, match="slides over 5 tokens in 1 layers is not supported"):
        load(str(tmp_path), family="i-dlm")


HOW: tuple[dict[str, Any], ...] = ({"cache": True}, {"cache": False}, {"sampler": "lookup:3"}, {"sampler": "strided:3"})


def test_d1_every_cache_of_a_network_that_slides(tmp_path: Path) -> None:
    """Logits at positions that a KV cache, a cache of ragged rows and padding serve are those of the whole text."""
    model = transformer("Qwen2", use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    network = load(str(publish(model, tmp_path))).network
    z_BT = torch.randint(80, (2, 24), generator=torch.Generator().manual_seed(1))
    whole_BTV, cache = network(z_BT), network.cache(2)
    parts = [network(part, cache=cache) for part in z_BT.split([9, 1, 5, 9], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole_BTV, atol=1e-4, rtol=1e-4)
    ragged, causal = network.ragged_cache(2, 32), torch.ones(2, 6, 6, dtype=torch.bool).tril()
    first = network(z_BT[:, :6], pos_BQ=torch.arange(6).expand(2, -1), cache=ragged, own_BQQ=causal)
    torch.testing.assert_close(first, whole_BTV[:, :6], atol=1e-4, rtol=1e-4)
    ragged.trim(torch.tensor([6, 3]))  # rows end at different places
    at_BQ = torch.tensor([[6], [3]]) + torch.arange(4)
    next_BQV = network(z_BT.gather(1, at_BQ), pos_BQ=at_BQ, cache=ragged, own_BQQ=causal[:, :4, :4])
    expected_BQV = whole_BTV.gather(1, at_BQ[..., None].expand(-1, -1, whole_BTV.shape[-1]))
    torch.testing.assert_close(next_BQV, expected_BQV, atol=1e-4, rtol=1e-4)
    valid_BT = torch.arange(24) >= torch.tensor([[0], [7]])
    padded_BTV = network(torch.cat([z_BT[:1], torch.cat([z_BT[1:, :7] * 0, z_BT[1:, :17]], 1)]), valid_BT=valid_BT)
    torch.testing.assert_close(padded_BTV[1, 7:], whole_BTV[1, :17], atol=1e-4, rtol=1e-4)
    index_BC = torch.tensor([[3, 17], [0, 23]])
    expected_BCV = whole_BTV.gather(1, index_BC[..., None].expand(-1, -1, whole_BTV.shape[-1]))
    torch.testing.assert_close(network(z_BT, index_BC=index_BC), expected_BCV, atol=1e-4, rtol=1e-4)
