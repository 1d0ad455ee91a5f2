"""Special tokens from every file that names them: BOS, EOS and others by role, and the tokens that a tokenizer puts around a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from dlm.errors import InputError
from dlm.files import read_object

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The names that transformers gives to a chat template."""
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "</s>")
"""Control tokens that end a text by their name, whatever a GGUF file says of them, as in llama.cpp (src/llama-vocab.cpp)."""


def named(directory: Path) -> dict[str, str]:
    """The texts of the special tokens by role (`ROLES`), of tokenizer_config.json and special_tokens_map.json. InputError for damage.

    As in transformers 5.23 the second file counts where the first has no `added_tokens_decoder`, and then it wins.
    """
    config, beside = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    found = read_object(config)
    sources = [(config, found)] if "added_tokens_decoder" in found else [(config, found), (beside, read_object(beside))]
    tokens: dict[str, str] = {}
    for path, data in sources:
        for role in ROLES & data.keys():
            value = data[role].get("content") if isinstance(data[role], dict) else data[role]
            if value is not None and not isinstance(value, str):
                raise InputError(f"{path} is damaged ({role} is {value!r}, not a text)")
            if value:
                tokens[role] = value
    return {role: tokens[role] for role in ROLES if role in tokens}


def mark(inner: tokenizers.Tokenizer, tokens: dict[str, str]) -> None:
    """Make these texts control tokens, where the vocabulary has them and the tokenizer does not say so itself."""
    vocabulary = inner.get_vocab(with_added_tokens=True)
    special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
    missing = [text for text in dict.fromkeys(tokens.values()) if text in vocabulary and text not in special]
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def around(inner: tokenizers.Tokenizer, where: Path) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text, by its post-processor. InputError for one that does anything else."""
    processor = None if inner.post_processor is None else json.loads(inner.post_processor.__getstate__())
    steps = processor["processors"] if processor is not None and processor["type"] == "Sequence" else [processor]
    adding = [step for step in steps if step is not None and step["type"] != "ByteLevel"]
    if len(adding) > 1:  # on which the library fails
        raise InputError(f"{where} has a tokenizer with {len(adding)} post-processors that add tokens: dlm reads one")
    return _of_step(adding[0], where) if adding else ([], [])


def _of_step(step: dict[str, Any], where: Path) -> tuple[list[int], list[int]]:
    kind = step["type"]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [step["cls"][1]], [step["sep"][1]]
    if kind != "TemplateProcessing":
        raise InputError(f"{where} has a tokenizer whose post-processor is of kind {kind}, which dlm does not read")
    sides: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for piece in step["single"]:
        if "Sequence" in piece:
            texts += 1
        else:
            sides[min(texts, 1)].extend(step["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    if texts != 1:
        raise InputError(f"{where} has a tokenizer whose post-processor takes a text {texts} times, not once")
    return sides


def as_ids(value: Any, where: str) -> list[int]:
    """An `eos_token_id`: nothing, a token id, or a list of them. InputError for anything else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if strange := [one for one in ids if not isinstance(one, int) or isinstance(one, bool)]:
        raise InputError(f"{where}: eos_token_id has {strange[0]!r}: it is a token id or a list of them")
    return ids
