"""GGUF files, written here by the package's own writer: the network, the vocabulary, and files that are not whole.

llama.cpp's converter interleaves the rows of q and k of the llama architecture; what it writes is what is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bases import LLAMA3, SPECIAL, TEMPLATE, tokenizer, transformer
from conftest import Dlm
from dlm.cli import app
from dlm.errors import InputError
from dlm.formats import gguf as reader
from dlm.formats.huggingface import NAMES as OF_TRANSFORMERS
from dlm.language_model import LanguageModel, load
from dlm.models.block import rotary
from dlm.models.config import TransformerConfig
from gguf_files import add_metadata, add_tensors, close, converted

KINDS = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3"}


def write(
    model: Any,
    path: Path,
    quantisation: str = "F32",
    pre: str = "gpt-2",
    *,
    metadata: Mapping[str, Any] | None = None,
    general: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """What convert_hf_to_gguf.py makes of the model.

    metadata: keys of the architecture, without its name; general: other keys. tensors: more of them, by the names of the file.
    """
    import gguf

    config, kind = model.config, KINDS[type(model).__name__.removesuffix("ForCausalLM")]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, kind)
    add_sizes(writer, config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, pre)
    add_metadata(writer, {**(general or {}), **{f"{kind}.{key}": value for key, value in (metadata or {}).items()}})
    if config.rope_parameters["rope_type"] == "llama3":
        scaling = tuple(config.rope_parameters[k] for k in list(LLAMA3)[2:])
        plain, scaled = (rotary_frequencies(head_dim, config.rope_parameters["rope_theta"], s) for s in ((), scaling))
        tensors = {"rope_freqs.weight": plain / scaled, **(tensors or {})}
    heads = {"attention.q": config.num_attention_heads, "attention.k": config.num_key_value_heads} if kind == "llama" else {}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    add_tensors(writer, {**converted(state, OF_TRANSFORMERS, reader.NAMES, heads), **(tensors or {})}, quantisation)
    close(writer)
    return path


def add_sizes(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_tokenizer(writer: Any, pre: str) -> None:
    import json

    inner = tokenizer()
    tokens = sorted(inner.get_vocab(), key=inner.get_vocab().get)  # type: ignore[arg-type]
    merges = [" ".join(pair) for pair in json.loads(inner.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(inner.token_to_id(SPECIAL[1]))
    writer.add_chat_template(TEMPLATE)


def rotary_frequencies(head_dim: int, base: float, scaling: tuple[float, ...]) -> torch.Tensor:
    """Angles at position 1, read off the sine, whose angle is at most 1 there."""
    return rotary(torch.ones(1, 1), head_dim, base, scaling)[1][0, 0, 0, : head_dim // 2].double().asin().float()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
        ("Qwen2", {}),
        ("Qwen3", {"tie_word_embeddings": True}),
    ],
    ids=["llama", "llama3", "qwen2", "qwen3"],
)
def test_logits_are_those_of_the_model(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    model = transformer(family, **changes)
    lm = load(str(write(model, tmp_path / "tiny.gguf")))
    z_BT = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(z_BT).logits
    torch.testing.assert_close(lm.network(z_BT)[..., :-1], expected, atol=1e-5, rtol=1e-5)
    assert lm.name == "tiny"
    assert lm.config.family == family.lower()
    assert lm.window == model.config.max_position_embeddings
    assert lm.stops == {tokenizer().token_to_id(SPECIAL[1])}
    assert lm.chat.tokens == {"eos_token": SPECIAL[1]}
    assert lm.config.network.rope_scaling == ((8.0, 1.0, 4.0, 8192.0) if "rope_parameters" in changes else ())
    lm.save_pretrained(tmp_path / "ours")
    again = load(str(tmp_path / "ours"))
    assert again.config == lm.config
    assert again.chat == lm.chat
    assert torch.equal(again.network(z_BT), lm.network(z_BT))
    assert again.tokenizer.fingerprint() == lm.tokenizer.fingerprint()


def test_d6_the_end_of_a_turn_stops_whatever_the_header_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header names another token, or none; <|im_end|> ends a turn by its name, another token by the template."""
    from gguf import GGUFWriter

    model = transformer("Llama", num_hidden_layers=1)
    start, end = (tokenizer().token_to_id(text) for text in SPECIAL)

    def stops(**metadata: Any) -> frozenset[int]:
        general = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
        return load(str(write(model, tmp_path / "a.gguf", general=general))).stops

    assert stops() == {end}
    monkeypatch.setattr(GGUFWriter, "add_eos_token_id", lambda *_: None)
    assert stops() == {end}
    assert stops(eos_token_id=3) == {3, end}
    assert stops(eot_token_id=5, eom_token_id=6) == {5, 6, end}
    turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_start|>{% endfor %}"
    monkeypatch.setattr(GGUFWriter, "add_chat_template", lambda self, _: self.add_string("tokenizer.chat_template", turn))
    assert stops() == {start, end}
    for metadata, told in (
        ({"eot_token_id": "no id"}, "eos_token_id has 'no id'"),
        ({"eom_token_id": 1.5}, r"eos_token_id has 1\.5"),
        ({"add_bos_token": True}, r"bos_token_id is missing"),
    ):
        with pytest.raises(InputError, match=told):
            stops(**metadata)


@pytest.mark.parametrize(("quantisation", "error"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2), ("Q4_1", 0.3)])
def test_quantized_weights_come_close(tmp_path: Path, quantisation: str, error: float) -> None:
    model = transformer("Llama", intermediate_size=64)
    network = load(str(write(model, tmp_path / "tiny.gguf", quantisation))).network
    for name, weight in {
        "q": network.get_parameter("blocks.1.attention.q.weight"),
        "down": network.get_parameter("blocks.1.mlp.down.weight"),
    }.items():
        exact = model.model.layers[1].self_attn.q_proj.weight if name == "q" else model.model.layers[1].mlp.down_proj.weight
        away = (weight - exact).norm() / exact.norm()
        assert 0 < away < error


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_vocabulary_reads_as_it_was_written(tmp_path: Path, pre: str) -> None:
    lm = load(str(write(transformer("Llama"), tmp_path / "tiny.gguf", pre=pre)))
    inner = tokenizer()
    for text in ("ROMEO: But soft, what light", "O Romeo, Romeo", "a  b\n\nc"):
        if not set(text) - {*"ROMEO: But soft,whalignd"}:
            assert lm.tokenizer.encode(text) == inner.encode(text).ids
    digits = lm.tokenizer.inner.pre_tokenizer.pre_tokenize_str("x1234")
    assert [piece for piece, _ in digits][1:] == {"llama-bpe": ["123", "4"], "gpt-2": ["1234"]}.get(pre, ["1", "2", "3", "4"])
    assert SPECIAL[1] in lm.tokenizer.control
    assert lm.tokenizer.control[SPECIAL[1]] not in lm.tokenizer.encode(SPECIAL[1])


def told(path: Path) -> str:
    with pytest.raises(InputError) as error:
        LanguageModel.from_pretrained(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_cut_anywhere_is_told(tmp_path: Path) -> None:
    path = write(transformer("Llama"), tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for keep in (1, 4, 10, 24, 100, 1000, 4000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        assert "is no whole GGUF file" in told(path), keep
    path.write_bytes(b"")
    assert "is no whole GGUF file" in told(path)
    path.write_bytes(b"PK" + whole[2:])
    assert "does not begin with GGUF" in told(path)
    path.write_bytes(whole[:4] + b"\x63" + whole[5:])
    assert "version 99" in told(path)


def test_garbage_inside_never_ends_in_a_traceback(tmp_path: Path) -> None:
    """Every byte of the header may be wrong: it loads, or one line tells why not."""
    path, rng = write(transformer("Llama"), tmp_path / "tiny.gguf"), np.random.default_rng(0)
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    for _ in range(150):
        data = whole.copy()
        data[rng.integers(4, 3000, size=2)] = rng.integers(0, 256, size=2, dtype=np.uint8)
        path.write_bytes(data.tobytes())
        try:
            load(str(path))
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_what_is_not_read_is_told(tmp_path: Path) -> None:
    model = transformer("Llama")
    assert "kind gpt2/gpt-4o" in told(write(model, tmp_path / "a.gguf", pre="gpt-4o"))
    assert "longrope" in told(write(model, tmp_path / "b.gguf", metadata={"rope.scaling.type": "longrope"}))
    path = write(model, tmp_path / "c.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"llama", b"gemma"))
    assert "'gemma'; dlm converts llama, qwen2, qwen3" in told(path)
    path.write_bytes(whole.replace(b"blk.0.attn_q.", b"blk.0.ssm_in."))
    assert "another architecture" in told(path)
    assert "no checkpoint" in told(tmp_path / "nothing.gguf")


def test_the_scaling_of_llama_3_is_monotone_and_leaves_what_turns_fast() -> None:
    plain, scaled = (rotary_frequencies(64, 500_000.0, s) for s in ((), (8.0, 1.0, 4.0, 8192.0)))
    ratio = plain / scaled
    assert torch.allclose(ratio[:8], torch.ones(8), atol=1e-5)
    assert ratio[-1].item() == pytest.approx(8.0, rel=1e-4)
    assert bool((ratio.diff() > -1e-4).all())
    with pytest.raises(ValueError, match="rope_scaling"):
        TransformerConfig(vocab_size=4, rope_scaling=(1.0,))


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q8_0", "F32"])
def test_a_file_of_few_bits_says_that_int4_takes_less(dlm: Dlm, tmp_path: Path, quantisation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits as the package's own reader counts bytes. In a model so small much is left in float32, so that the bound lies higher."""
    import gguf

    path = write(transformer("Llama"), tmp_path / "tiny.gguf", quantisation)
    tensors = gguf.GGUFReader(path).tensors
    bits = 8 * sum(int(one.n_bytes) for one in tensors) / sum(int(one.n_elements) for one in tensors)
    assert reader.bits(path) == pytest.approx(bits)
    monkeypatch.setattr(app, "FEW_BITS", 11.0)
    words = ("generate", "the", str(path), "--max-new-tokens", "2")
    hint = "and float32 spends 32: --dtype int4 takes about half the memory"
    assert (hint in dlm(*words)[2]) == (quantisation == "Q4_0")
    assert hint not in dlm(*words, "--dtype", "bfloat16")[2]
