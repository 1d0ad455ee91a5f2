"""Hostile tokenizers are refused at once, before they take memory; those of well-known kinds are read."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bases import tokenizer
from conftest import make_model
from dlm.errors import InputError
from dlm.language_model import load
from dlm.text import tokenizer as reader
from dlm.text.tokenizer import Tokenizer as OurTokenizer

TEN = normalizers.Replace("a", "a" * 10)


def saved(path: Path, **parts: Any) -> Path:
    """The tokenizer of the tests with other parts, in a file."""
    inner = tokenizer()
    for name, part in parts.items():
        setattr(inner, name, part)
    inner.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


def precompiled(text: bytes) -> dict[str, str]:
    """A map of characters without a trie, and one text."""
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode((0).to_bytes(4, "little") + text + b"\0").decode()}


HOSTILE: dict[str, dict[str, Any]] = {
    "nine times ten": {"normalizer": normalizers.Sequence([TEN] * 9)},
    "nested": {"normalizer": normalizers.Sequence([normalizers.Sequence([TEN, TEN]), TEN])},
    "one long text": {"normalizer": normalizers.Replace("a", "b" * 10**6)},
    "between all characters": {"normalizer": normalizers.Replace(Regex(""), "b" * 1000)},
    "before": {"normalizer": normalizers.Prepend("a" * 10**6)},
    "bytes of bytes": {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 30)},
    "normalizer and words": {
        "normalizer": normalizers.Sequence([TEN]),
        "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Metaspace()] * 3),
    },
    "decoder": {"decoder": decoders.Sequence([decoders.Replace("a", "a" * 10)] * 9)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tokenizer_that_multiplies_text_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path, begin = saved(tmp_path, **HOSTILE[name]), time.process_time()
    with pytest.raises(InputError, match="dlm does not run it") as error:
        reader.read(path)
    assert "\n" not in str(error.value)
    assert time.process_time() - begin < 1


def test_added_tokens_are_not_normalized_before_the_check(tmp_path: Path) -> None:
    """The library normalizes them while it reads the file."""
    inner = tokenizer()
    inner.add_tokens([AddedToken("a" * 100, normalized=True)])
    data = json.loads(inner.to_str())
    data["normalizer"] = json.loads(normalizers.Sequence([TEN] * 9).__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="2e\\+09 times"):
        reader.read(tmp_path)


def test_a_map_of_characters_has_short_texts(tmp_path: Path) -> None:
    for length in (33, 1000):
        data = json.loads(tokenizer().to_str()) | {"normalizer": precompiled(b"a" * length)}
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        if length == 33:  # as long as the longest of nmt_nfkc
            assert reader.read(tmp_path).get_vocab_size()
            continue
        with pytest.raises(InputError, match="makes 1000 bytes of a character"):
            reader.read(tmp_path)


KNOWN: dict[str, Any] = {
    "llama": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "albert": normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.Replace("''", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    ),
    "bert": normalizers.BertNormalizer(),
    "qwen": normalizers.NFC(),
    "bytes": normalizers.ByteLevel(),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_normalizers_are_read(tmp_path: Path, name: str) -> None:
    assert reader.read(saved(tmp_path, normalizer=KNOWN[name])).encode("so").ids


@pytest.mark.parametrize(
    "text", ["3", "[]", '{"normalizer": 3}', '{"normalizer": {"type": "Replace"}}', "[" * 20000, "{", '{"a": ' + "9" * 5000]
)
def test_a_damaged_tokenizer_gets_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        reader.read(tmp_path)


def test_an_error_of_the_library_gets_one_line() -> None:
    """A regular expression that tries too much panics, which is no Exception; a vocabulary may lack its unknown token."""
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate("ab")}, []))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$b"), "isolated")
    with pytest.raises(InputError, match="fails on this text"):
        OurTokenizer(inner).encode("a" * 40)


def test_a_checkpoint_with_a_hostile_tokenizer_is_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "m")
    saved(tmp_path / "m", normalizer=normalizers.Sequence([TEN] * 9))
    with pytest.raises(InputError, match="dlm does not run it"):
        load(str(tmp_path / "m"))
