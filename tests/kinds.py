"""Tokenizers of every kind that checkpoints bring: how each writes spaces, and characters that it has no token of."""

from __future__ import annotations

import json
from typing import Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from conftest import TEXT
from dlm.text import tokenizer
from dlm.text.tokenizer import Tokenizer

SPACE = "\u2581"
Scheme = Literal["first", "always", "never"]


def byte_level(*special: str, prefix: bool = False, size: int = 300) -> tokenizers.Tokenizer:
    """As GPT-2 and Qwen. prefix: a space before every text."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet))
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", *special)])
    return inner


def sentencepiece(scheme: Scheme | None, *, decoder: Literal["strip", "metaspace"] = "strip", size: int = 340) -> tokenizers.Tokenizer:
    """Byte fallback and spaces as U+2581. scheme: of the pre-tokenizer, None for a normalizer as Llama 2's."""
    made = [f"<0x{i:02X}>" for i in range(256)]
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *made])
    inner.train_from_iterator([TEXT], trainer)
    data = json.loads(inner.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in made]
    if scheme is None:
        data["pre_tokenizer"] = None
    inner = tokenizers.Tokenizer.from_str(json.dumps(data))
    if scheme is None:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=True)
    strips = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    spaces = [decoders.ByteFallback(), decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme or "always")]
    inner.decoder = decoders.Sequence((strips if scheme != "never" else strips[:3]) if decoder == "strip" else spaces)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


def word_piece() -> tokenizers.Tokenizer:
    """As BERT."""
    letters = sorted({c for c in TEXT.lower() if c.isalnum()})
    words = ["[UNK]", *letters, *[f"##{c}" for c in letters], "the", "##ing", "king", ".", ",", "'", "?"]
    inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return inner


def kinds() -> dict[str, Tokenizer]:
    """By name. The text of a prompt comes back from all but `words`."""
    composed = byte_level()
    composed.normalizer = normalizers.NFC()
    return {
        "characters": Tokenizer.characters(TEXT + "天地🙂é\u0301"),
        "bytes": Tokenizer.bytes(),
        "byte-level": Tokenizer(byte_level()),
        "byte-level, NFC": Tokenizer(composed),
        "byte-level, space before": Tokenizer(byte_level(prefix=True)),
        "sentencepiece, first": Tokenizer(sentencepiece("first")),
        "sentencepiece, always": Tokenizer(sentencepiece("always")),
        "sentencepiece, never": Tokenizer(sentencepiece("never")),
        "sentencepiece, normalizer": Tokenizer(sentencepiece(None)),
        "sentencepiece, metaspace decoder": Tokenizer(sentencepiece("first", decoder="metaspace")),
        "words": Tokenizer(word_piece()),
        "numbers": Tokenizer(tokenizer.numbers(50)),
    }
