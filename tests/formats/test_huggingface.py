"""Converted checkpoints give the logits of transformers, survive the way back, and bad ones get one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bases import LLAMA3, SPECIAL, publish, tokenizer, transformer
from conftest import make_model
from dlm.errors import InputError
from dlm.formats import huggingface
from dlm.language_model import LanguageModel, load
from dlm.noise import loss

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 8.0], "long_factor": [9.0] * 4}
LONG |= {"original_max_position_embeddings": 64}
SLIDES = {"use_sliding_window": True, "sliding_window": 5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16, "factor": 4.0}}),
    "yarn": ("Qwen2", {"rope_parameters": YARN}),
    "yarn, shorter": ("Llama", {"rope_parameters": YARN | {"factor": 0.25, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic": ("Qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "longrope": ("Llama", {"rope_parameters": LONG}),
    "sliding": ("Qwen2", SLIDES | {"layer_types": ["sliding_attention", "full_attention"]}),
    "all sliding": ("Qwen3", SLIDES | {"max_window_layers": 0}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "spare": 7}),
}


def logits_of(model: Any, z_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(z_BT).logits
    return logits


def ids(model: Any) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    model = transformer(family, **changes)
    lm = load(str(publish(model, tmp_path / variant)))
    z_BT, size = ids(model), model.config.vocab_size
    assert lm.config.network.vocab_size == size + 1
    assert lm.tokenizer.mask_id == size == lm.config.mask_token_id
    assert lm.config.family == family.lower()
    assert not lm.is_diffusion
    assert lm.name == variant
    torch.testing.assert_close(lm.network(z_BT)[..., :size], logits_of(model, z_BT), atol=1e-5, rtol=1e-5)
    embed = lm.network.embed.weight
    torch.testing.assert_close(embed[-1], embed[:-1].mean(0))
    assert (lm.network.head.weight is embed) == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, tmp_path: Path) -> None:
    """Into our own format, bit for bit; and back into Hugging Face's, tensor for tensor, where transformers reads it again."""
    import transformers

    family, changes = VARIANTS[variant]
    model = transformer(family, **changes)
    lm = load(str(publish(model, tmp_path / "theirs")))
    lm.save_pretrained(tmp_path / "ours")
    again = load(str(tmp_path / "ours"))
    assert again.config == lm.config
    assert again.defaults == lm.defaults
    assert again.chat == lm.chat
    assert again.stops == lm.stops
    assert again.tokenizer.vocab_size == lm.tokenizer.vocab_size
    assert torch.equal(again.network(ids(model)), lm.network(ids(model)))

    huggingface.to_hugging_face(lm.network, lm.config, tmp_path / "back", files=lm.files())
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    old, new = model.state_dict(), back.state_dict()
    assert type(back) is type(model)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)
    assert torch.equal(logits_of(back, ids(model)), logits_of(model, ids(model)))


def test_shards_and_bfloat16(tmp_path: Path) -> None:
    model = transformer("Llama")
    path = publish(model, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    lm = load(str(path), dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in lm.network.parameters())
    lm.save_pretrained(tmp_path / "half")
    assert torch.equal(load(str(tmp_path / "half"), dtype=torch.bfloat16).network(ids(model)), lm.network(ids(model)))


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_text_and_stops_are_those_of_transformers(tmp_path: Path, cache: bool) -> None:
    """Batches of different prompts, each ended by its own stop token."""
    model = transformer("Qwen3", seed=3)
    lm = load(str(publish(model, tmp_path)))
    ends = 0
    for prompt in ("ROMEO:", "what light", "a"):
        head = torch.tensor([lm.tokenizer.encode(prompt)])
        free = model.generate(head, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, head.shape[1] :].tolist()
        lm.defaults["eos_token_id"] = [free[7]]
        expected = free[: free.index(free[7]) + 1]
        made = lm.generate([prompt, "y"], temperature=0.0, max_new_tokens=20, cache=cache)[0]
        assert made.trajectory.current_BT[0, head.shape[1] :][: len(expected)].tolist() == expected
        assert made.tokens == len(expected)
        assert made.text == prompt + lm.tokenizer.decode(expected[:-1])
        ends += made.tokens < 20
        lm.defaults["eos_token_id"] = []
        assert lm.generate(prompt, temperature=0.0, max_new_tokens=20, cache=cache).text == prompt + lm.tokenizer.decode(free)
    assert ends == 3


def test_text_longer_than_the_window_goes_on(tmp_path: Path) -> None:
    lm = load(str(publish(transformer("Llama"), tmp_path)))
    lm.defaults["eos_token_id"] = []
    cached, plain = (lm.generate("ROMEO:", temperature=0.0, max_new_tokens=150, cache=cache) for cache in (True, False))
    assert cached.text == plain.text
    assert cached.tokens == 150


def test_a_base_without_start_token_wants_a_prompt(tmp_path: Path) -> None:
    path = publish(transformer("Llama"), tmp_path)
    with pytest.raises(InputError, match="at least one token"):
        load(str(path)).generate("")


def test_a_tokenizer_that_begins_texts_gives_the_start_token(tmp_path: Path) -> None:
    """As Llama 3's: the network reads it before every text, and it is no part of the text."""
    from tokenizers.processors import TemplateProcessing

    model = transformer("Llama")
    path, inner = publish(model, tmp_path), tokenizer()
    start = inner.token_to_id(SPECIAL[0])
    inner.post_processor = TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], start)])
    inner.save(str(path / "tokenizer.json"))
    lm = load(str(path))
    assert lm.config.start_token_id == start
    lm.defaults["eos_token_id"] = []
    expected = model.generate(torch.tensor([[start]]), max_new_tokens=10, do_sample=False, pad_token_id=0)[0, 1:].tolist()
    assert lm.generate("", temperature=0.0, length=10).text == lm.tokenizer.decode(expected)
    assert lm.chat_canvas([{"role": "user", "content": "a"}]).tokens_BT[0, 0] != start


def test_the_exact_loss_is_the_cross_entropy_of_transformers(tmp_path: Path) -> None:
    model = transformer("Llama")
    lm, x_BT = load(str(publish(model, tmp_path))), ids(model)
    free_BT = torch.ones_like(x_BT, dtype=torch.bool)
    nats_B = loss.autoregressive(lm.noise, lm.predict, x_BT, free_BT)
    logp_BTV = logits_of(model, x_BT)[:, :-1].log_softmax(-1)
    expected_B = -logp_BTV.gather(-1, x_BT[:, 1:, None]).squeeze(-1).sum(-1)
    size = model.config.vocab_size
    torch.testing.assert_close(nats_B, expected_B + torch.tensor(float(size)).log(), atol=1e-3, rtol=1e-5)


def told(path: Path) -> str:
    with pytest.raises(InputError) as error:
        LanguageModel.from_pretrained(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return publish(transformer("Llama"), tmp_path / "llama")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "gpt2"}, "llama, qwen2, qwen3"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "kind 'mrope' are not supported (read are default, linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "YaRN without truncation"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "lacks 'factor'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "lacks 'short_factor'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', not a number above 0"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "factor"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "slides over 16"),
        ({"hidden_size": None}, "config"),
        ({"hidden_size": 64}, "do not fit"),
        ({"num_hidden_layers": 3}, "do not fit"),
        ({"num_attention_heads": 3}, "divisor"),
        ({"vocab_size": 20}, "belong together"),
        ({"vocab_size": 400}, "do not fit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_is_not_read_is_told(llama: Path, changes: dict[str, Any], word: str) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | changes))
    assert word in told(llama)


def test_a_window_that_slides_no_further_than_the_text_is_read(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}))
    load(str(llama))


def test_damaged_files_are_told(llama: Path) -> None:
    config = (llama / "config.json").read_text()
    (llama / "config.json").write_text(config[:40])
    assert "damaged" in told(llama)
    data = json.loads(config)
    del data["hidden_size"]
    (llama / "config.json").write_text(json.dumps(data))
    assert "lacks 'hidden_size'" in told(llama)
    (llama / "config.json").write_text(config)
    template = (llama / "tokenizer_config.json").read_text()
    (llama / "tokenizer_config.json").write_text("[1")
    assert "tokenizer_config.json is damaged" in told(llama)
    (llama / "tokenizer_config.json").write_text(template)
    whole = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in told(llama)
    (llama / "model.safetensors").unlink()
    torch.save({}, llama / "pytorch_model.bin")
    assert "lacks model.safetensors" in told(llama)


def test_a_tensor_of_another_architecture_is_told(llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(llama / "model.safetensors")
    save_file(state | {"model.layers.0.block_sparse_moe.gate.weight": torch.zeros(2)}, llama / "model.safetensors")
    assert "block_sparse_moe" in told(llama)


def test_our_own_training_does_not_begin_with_a_foreign_directory(llama: Path) -> None:
    from dlm.formats import native

    with pytest.raises(InputError, match="convert it first"):
        native.load(llama)


def test_only_what_has_a_form_is_exported(masked_dir: Path) -> None:
    lm = load(str(masked_dir))
    convolved = make_model("autoregressive", mlp="swiglu", qk_norm=False, conv=3)
    for one in (lm, convolved):
        with pytest.raises(InputError, match="Hugging Face form"):
            huggingface.to_hugging_face(one.network, one.config, masked_dir / "out")
