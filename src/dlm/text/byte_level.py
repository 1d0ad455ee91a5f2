"""The tokenizer of a directory: tokenizer.json, or vocab.json with merges.txt, as slow tokenizers of transformers keep it.

Byte-level BPE with Qwen2's words (Dream, SDAR): no code of the checkpoint (`tokenization_dream.py`) is needed to read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from dlm.errors import InputError
from dlm.files import read_json
from dlm.text import tokenizer

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The word boundaries of Llama 3 and Qwen2; %s: the quantifier of digits."""


def read(directory: Path, vocab_size: int = 0) -> tokenizers.Tokenizer:
    """The tokenizer of a network of so many ids; without any file of one, a text is token ids.

    InputError where files are missing, damaged or contradict one another.
    """
    if (directory / "tokenizer.json").is_file():
        return tokenizer.read(directory)
    if (directory / "tokenizer.model").is_file():
        raise InputError(f"{directory} has its tokenizer in SentencePiece's form alone: put the tokenizer.json of the model beside it")
    if vocab_size and not any((directory / name).is_file() for name in ("vocab.json", "merges.txt", "tokenizer_config.json")):
        return tokenizer.numbers(vocab_size)
    lacking = [name for name in ("vocab.json", "merges.txt") if not (directory / name).is_file()]
    if lacking:
        raise InputError(f"{directory} has no tokenizer: neither tokenizer.json nor {' and '.join(lacking)}")
    try:
        vocabulary = read_json(directory / "vocab.json")
        lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
        merges = [(first, second) for first, _, second in pairs]
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        added = _added(directory)
    except InputError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise InputError(f"the vocab.json, merges.txt or added tokens of {directory} are damaged ({str(error).splitlines()[0]})") from None
    inner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS % ""), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    for number, token in sorted(added.items()):
        inner.add_tokens([token])
        if inner.token_to_id(token.content) != number:
            raise InputError(f"{directory}: the added token {token.content!r} should be {number}: tokens before it are missing")
    return inner


def _added(directory: Path) -> dict[int, AddedToken]:
    """Added tokens by id: of tokenizer_config.json, and those that only added_tokens.json has."""
    plain: dict[str, int] = {}
    full: dict[str, dict[str, Any]] = {}
    if (file := directory / "added_tokens.json").is_file():
        plain = read_json(file)
    if (file := directory / "tokenizer_config.json").is_file():
        full = read_json(file).get("added_tokens_decoder", {})
    found = {int(i): AddedToken(content, normalized=False) for content, i in plain.items()}
    return found | {int(i): AddedToken(t["content"], special=bool(t.get("special")), normalized=False) for i, t in full.items()}
