"""Text to tokens and back; nothing that a prompt can spell is a special token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from dlm.errors import InputError
from dlm.text.tokenizer import Tokenizer

POEM = "The quick brown fox jumps over the lazy dog.\nHow razorback-jumping frogs can level six piqued gymnasts!\n" * 20
SPECIAL = ["[MASK]", "<|endoftext|>"]


def train_bpe(vocab_size: int = 400) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([POEM], trainer)
    return inner


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe().save(str(path))
    return Tokenizer.load(path)


def test_characters_in_code_point_order() -> None:
    tokenizer = Tokenizer.characters("banana\n é█")
    assert tokenizer.vocab_size == 7
    assert tokenizer.mask_id == 7
    assert [tokenizer.piece(i) for i in range(7)] == ["\n", " ", "a", "b", "n", "é", "█"]
    assert tokenizer.encode("nab\n") == [4, 2, 3, 0]
    assert tokenizer.decode([4, 2, 3, 0]) == "nab\n"
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.pieces() == {i: tokenizer.piece(i) for i in range(7)}


@given(st.text(min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_characters_round_trip(text: str) -> None:
    tokenizer = Tokenizer.characters(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.vocab_size == len(set(text)) == len(set(ids))
    assert tokenizer.decode(ids) == text == "".join(tokenizer.piece(i) for i in ids)
    assert tokenizer.encode_corpus([text, text[::-1]]).tolist() == ids + ids[::-1]


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = BYTES
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert all(0 <= i < 256 for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_corpus([text]).tolist() == ids


BYTES = Tokenizer.bytes()


def test_bytes_are_256_tokens_one_for_each_byte() -> None:
    assert (BYTES.vocab_size, BYTES.mask_id) == (256, 256)
    low = [BYTES.encode(chr(byte)) for byte in range(128)]
    assert all(len(ids) == 1 for ids in low)
    high = {i for text in ("\u00ff\u00bf\u0080", "߿", "\uffff\u8000", "\U0010ffff\U00040000") for i in BYTES.encode(text)}
    assert not high & {ids[0] for ids in low}
    assert BYTES.decode(BYTES.encode("é")[:1]) == "\ufffd"


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_subwords_round_trip(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


BPE = Tokenizer(train_bpe())


def test_subwords_are_shorter_than_their_text(bpe: Tokenizer) -> None:
    ids = bpe.encode(POEM)
    assert len(ids) < 0.5 * len(POEM)
    assert bpe.decode(ids) == POEM
    assert bpe.encode_corpus([POEM, "fox"]).tolist() == ids + bpe.encode("fox")
    assert bpe.vocab_size == bpe.mask_id
    assert bpe.vocab_size <= 400
    assert max(ids) < bpe.vocab_size


@pytest.mark.parametrize("word", SPECIAL)
def test_what_looks_like_a_special_token_is_text(bpe: Tokenizer, word: str) -> None:
    special = bpe.inner.token_to_id(word)
    text = f"a {word} b{word}"
    ids = bpe.encode(text)
    assert special not in ids
    assert bpe.mask_id not in ids
    assert len(ids) > 6
    assert bpe.decode(ids) == text
    assert special not in bpe.encode_corpus([text]).tolist()
    # the same file, read plainly, does take it out of the text: the test above can fail
    assert special in tokenizers.Tokenizer.from_str(bpe.inner.to_str()).encode(text).ids
    assert bpe.decode([special]) == word


@pytest.mark.parametrize("word", ["[MASK]", "█", "<mask>", "<unk>", "<|endoftext|>", "\x00"])
def test_what_looks_like_the_mask_is_text(word: str) -> None:
    for tokenizer in (Tokenizer.characters(word + "ab"), BYTES, BPE):
        ids = tokenizer.encode(f"a{word}b")
        assert tokenizer.mask_id not in ids
        assert tokenizer.decode(ids) == f"a{word}b"


def test_the_mask_has_no_text() -> None:
    for tokenizer in (Tokenizer.characters("abc"), BYTES, BPE):
        ids = tokenizer.encode("abc")
        assert tokenizer.decode([tokenizer.mask_id, *ids, tokenizer.mask_id]) == "abc"
        assert tokenizer.mask_id not in tokenizer.pieces()


def test_characters_that_a_model_lacks_are_named() -> None:
    tokenizer = Tokenizer.characters("abc \n")
    for call in (tokenizer.encode, lambda text: tokenizer.encode_corpus(["a", text])):
        with pytest.raises(InputError, match=r"no token for 'é' \(U\+00E9\).* newline and  abc$") as error:
            call("aéa")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"'q'.*'r'.*'s'.*'t'.*'u'.*\.\.\."):
        tokenizer.encode("zyxwvutsrq")
    with pytest.raises(InputError, match=r"'\\n' \(U\+000A\)"):
        Tokenizer.characters("abc").encode("a\nb")


def test_a_vocabulary_without_a_newline_does_not_claim_one() -> None:
    with pytest.raises(InputError) as error:
        Tokenizer.characters("abc").encode("d")
    assert "newline" not in str(error.value)


def test_no_text_is_told() -> None:
    with pytest.raises(InputError, match="not empty"):
        Tokenizer.characters("")


@pytest.mark.parametrize("name", ["characters", "bytes", "bpe"])
def test_a_saved_tokenizer_is_the_same(tmp_path: Path, name: str) -> None:
    tokenizer = {"characters": Tokenizer.characters(POEM), "bytes": Tokenizer.bytes(), "bpe": Tokenizer(train_bpe())}[name]
    tokenizer.save(tmp_path / "tokenizer.json")
    for again in (Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json"), Tokenizer.make(str(tmp_path), "")):
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.encode(POEM) == tokenizer.encode(POEM)
        assert again.pieces() == tokenizer.pieces()
        assert (again.vocab_size, again.mask_id) == (tokenizer.vocab_size, tokenizer.mask_id)


def test_a_fingerprint_tells_tokenizers_apart() -> None:
    prints = {t.fingerprint() for t in (Tokenizer.characters("abc"), Tokenizer.characters("abd"), Tokenizer.bytes(), BPE)}
    assert len(prints) == 4
    assert Tokenizer.make("chars", "cab").fingerprint() == Tokenizer.characters("abc").fingerprint()
    assert Tokenizer.make("bytes", "").fingerprint() == BYTES.fingerprint()


def test_padding_and_truncation_of_a_file_are_not_obeyed(tmp_path: Path) -> None:
    inner = train_bpe()
    inner.enable_truncation(4)
    inner.enable_padding(length=32)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode(POEM)) == POEM


def test_a_long_corpus_is_the_same_in_pieces() -> None:
    long = ("The quick brown fox. " * 4000)[:70_001]
    for tokenizer in (Tokenizer.characters(POEM), BYTES, BPE):
        assert tokenizer.encode_corpus([long, "", "fox"]).tolist() == tokenizer.encode(long) + tokenizer.encode("fox")
    assert Tokenizer.characters("a").encode_corpus([]).shape == (0,)


def test_a_long_corpus_of_a_small_subword_vocabulary_is_not_cut_inside_a_token() -> None:
    inner = tokenizers.Tokenizer(models.BPE())
    letters = [chr(i) for i in range(0x4E00, 0x4E00 + 254)]
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=["a", *letters], show_progress=False)
    inner.train_from_iterator(["aaaa" * 5], trainer)
    inner.decoder = decoders.Fuse()
    tokenizer = Tokenizer(inner)
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("aa") == [tokenizer.encode("aaaa")[0]]
    long = letters[0] + "aa" * 40_000  # position 65536, where text that may be cut is cut, lies inside a token
    assert tokenizer.encode_corpus([long]).tolist() == tokenizer.encode(long)


@pytest.mark.parametrize("path", ["missing.json", "."])
def test_a_missing_tokenizer_is_told(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match="does not exist") as error:
        Tokenizer.load(tmp_path / path)
    assert "\n" not in str(error.value)


def test_a_damaged_tokenizer_is_told(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes()[:500])
    with pytest.raises(InputError, match=r"is not a tokenizer\.json") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_character_that_a_subword_vocabulary_would_drop_is_told() -> None:
    inner = tokenizers.Tokenizer(models.BPE({"h": 0, "i": 1, "hi": 2}, [("h", "i")]))
    tokenizer = Tokenizer(inner)
    assert tokenizer.encode("hi") == [2]
    with pytest.raises(InputError, match=r"U\+00E9"):
        tokenizer.encode("hi\u00e9")


def test_bpe_is_learned_from_the_text() -> None:
    text = "the cat and the hat and the bat\n" * 30
    made = Tokenizer.make("bpe:17", text)
    assert made.vocab_size == 17
    assert made.decode(made.encode("the hat and the cat\n")) == "the hat and the cat\n"
    assert len(made.encode(text)) < len(text) / 2
    assert np.array_equal(made.encode_corpus([text]), made.encode(text))
    with pytest.raises(InputError, match="no token"):
        made.encode("xyz")
    for strange in ("the cat\t", "na\u00efve"):
        with pytest.raises(InputError, match="no token"):
            made.encode_corpus([strange])
    with pytest.raises(InputError, match="merge"):
        Tokenizer.make("bpe:10", text)
    with pytest.raises(InputError, match="more text"):
        Tokenizer.make("bpe:5000", text)
