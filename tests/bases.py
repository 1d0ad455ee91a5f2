"""Tiny checkpoints of other libraries with random weights, as their authors publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken

from conftest import TEXT
from dlm.text.tokenizer import Tokenizer

WORDS = TEXT[:150] + "0123456789<|>_"
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with two control tokens."""
    inner = Tokenizer.bpe(WORDS, 80).inner
    inner.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return inner


def transformer(family: str, *, seed: int = 0, spare: int = 0, **changes: Any) -> Any:
    """A transformers model. spare: ids that no token has."""
    import transformers

    torch.manual_seed(seed)
    size = tokenizer().get_vocab_size() + spare
    extra = {"head_dim": 16} if family == "Qwen3" else {}
    config = getattr(transformers, f"{family}Config")(vocab_size=size, **(SIZES | extra | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model.eval()


def publish(model: Any, directory: Path, **save: Any) -> Path:
    """The directory that a hub would give."""
    model.save_pretrained(directory, **save)
    tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": SPECIAL[1]}))
    return directory
