"""The text drawn for tokens, of every kind of tokenizer: joined it is the decoded whole, and nothing that stands in it is lost."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm.errors import InputError
from dlm.spelling import MASK, REPLACEMENT, Part, Spelling
from dlm.text.parts import byte_alphabet
from dlm.text.tokenizer import Tokenizer
from kinds import kinds

KINDS = kinds()
TEXTS = [kind for kind in KINDS if kind not in ("words", "numbers")]  # these give back any text
SOME = "the king is 天地 🙂👩‍🚀 e\u0301 \n\t  wherefore,한Ti\u1ebfng"
BYTES = KINDS["bytes"]


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_joined_are_the_decoded_whole(kind: str, data: st.DataObject) -> None:
    """Of any ids, also where their bytes are no characters; as the library decodes them, but for runs of bytes that it gives up."""
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    theirs: str = tokenizer.inner.decode(ids, skip_special_tokens=False)
    assert tokenizer.spelling.text(ids) == tokenizer.decode(ids)
    if not kind.startswith("sentencepiece") or REPLACEMENT not in theirs:
        assert tokenizer.decode(ids) == theirs


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("sentencepiece")])
def test_a_broken_byte_costs_no_character_beside_it(kind: str) -> None:
    tokenizer = KINDS[kind]
    prompt = tokenizer.encode("the 天")
    broken: list[Any] = [tokenizer.inner.token_to_id(f"<0x{byte:02X}>") for byte in (0xE5, 0xA4, 0x41, 0xFF)]
    assert tokenizer.decode([*prompt, *broken]) == tokenizer.decode(prompt) + "\ufffdA\ufffd"


@pytest.mark.parametrize("kind", TEXTS)
@given(st.text(st.sampled_from(SOME), max_size=24))
@settings(max_examples=60, deadline=None)
def test_a_text_is_drawn_as_it_was_written(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    if kind == "characters":
        text = "".join(c for c in text if c in tokenizer.inner.get_vocab())
    ids = tokenizer.encode(text)
    drawn = tokenizer.spelling.text(ids)
    assert drawn == tokenizer.decode(ids) == tokenizer.inner.decode(ids, skip_special_tokens=False)
    assert drawn.strip(" ") == (tokenizer._normal(text) if kind != "sentencepiece, normalizer" else text).strip(" ")
    assert REPLACEMENT not in drawn


@pytest.mark.parametrize("kind", TEXTS)
def test_a_frame_with_holes_shows_every_whole_character_and_every_mask(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(0)
    ids = tokenizer.encode("the king, 天🙂 O king")
    whole = tokenizer.spelling.draw(ids)
    for _ in range(60):
        frame = [token if rng.random() < 0.6 else tokenizer.mask_id for token in ids]
        shown = tokenizer.spelling.draw(frame)
        assert [text == MASK for text in shown] == [token == tokenizer.mask_id for token in frame]
        for at, text in enumerate(whole):
            begin = at
            while begin and not whole[begin - 1]:  # the tokens that share its character
                begin -= 1
            if text and tokenizer.mask_id not in frame[begin : at + 1]:
                assert shown[at] == text or at == 0
        for part in "".join(shown).split(MASK):  # a part of a character is one mark, on either side
            assert part.count(REPLACEMENT) <= 2


@pytest.mark.parametrize(
    ("holes", "shown"),
    [
        ([], ["", "", "天", "a"]),
        ([0], [MASK, "", REPLACEMENT, "a"]),
        ([1], ["\ufffd", MASK, REPLACEMENT, "a"]),
        ([2], ["", REPLACEMENT, MASK, "a"]),
        ([3], ["", "", "天", MASK]),
        ([0, 2], [MASK, REPLACEMENT, MASK, "a"]),
    ],
)
def test_a_character_stands_at_the_token_that_completes_it(holes: list[int], shown: list[str]) -> None:
    ids = BYTES.encode("天a")
    assert BYTES.spelling.draw([BYTES.mask_id if i in holes else token for i, token in enumerate(ids)]) == shown


def test_a_token_may_end_one_character_and_begin_the_next() -> None:
    first, second = "天".encode(), "地".encode()
    parts = {0: Part(first[:2]), 1: Part(first[2:] + second[:1]), 2: Part(second[1:] + b"!"), 3: Part(b" x", b"x")}
    spelling = Spelling(parts, mask_id=4)
    assert spelling.draw([0, 1, 2]) == ["", "天", "地!"]
    assert spelling.draw([0, 1, 4, 2]) == ["", "天\ufffd", MASK, "\ufffd!"]
    assert spelling.draw([3, 3]) == ["x", " x"]
    assert spelling.draw([4, 3]) == [MASK, " x"]
    again = Spelling.from_record(json.loads(json.dumps(spelling.record(range(5)))), mask_id=4)
    assert again.parts == parts
    assert again.same(spelling)
    assert not again.same(Spelling(parts | {0: Part(b"a")}, mask_id=4))


def test_the_record_of_whole_tokens_is_that_of_earlier_versions() -> None:
    assert Spelling.of({0: "a", 1: "天"}, 2).record([0, 1, 2]) == {"pieces": {"0": "a", "1": "天"}}
    assert Spelling.from_record({"pieces": {"0": "a"}}, 2).draw([0, 2, 1]) == ["a", MASK, REPLACEMENT]
    for damaged in ({"pieces": {"0": None}}, {"pieces": {"0": 3}}, {"pieces": {"x": "a"}}, {"pieces": {"0": "a"}, "bytes": {"0": "zz"}}):
        with pytest.raises((ValueError, TypeError)):
            Spelling.from_record(damaged, 2)


def test_the_table_of_bytes_is_that_of_the_library() -> None:
    from tokenizers import decoders, pre_tokenizers

    table = byte_alphabet()
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))
    assert all(decoders.ByteLevel().decode([letter]) == chr(byte) for letter, byte in table.items() if byte < 128)
    word = "天🙂é"
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]
    assert bytes(table[letter] for letter in letters) == word.encode()


# --- what stands before a text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("text", ["ly", " my lord", "天🙂", "  two", "\nis here", "é"])
def test_d10_a_text_inside_another_keeps_its_own_spaces(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    if kind == "characters":
        text = "".join(c for c in text if c in tokenizer.inner.get_vocab())
    before = tokenizer.encode("the king")
    assert tokenizer.decode([*before, *tokenizer.encode(text, "inside")]) == tokenizer.decode(before) + text


@pytest.mark.parametrize("kind", TEXTS)
def test_d10_a_template_and_a_corpus_hold_no_space_of_their_own(kind: str) -> None:
    tokenizer = KINDS[kind]
    row = tokenizer.encode_template("the king__ly_, O king")
    assert [i for i, token in enumerate(row) if token is None] != []
    assert row.count(None) == 3
    assert tokenizer.decode([token for token in row if token is not None]).strip(" ") == "the kingly, O king"
    corpus = tokenizer.encode_corpus(["the king", "\nis here", "ly"]).tolist()
    assert tokenizer.decode(corpus).strip(" ") == "the king\nis herely"


# --- Unicode in other forms ------------------------------------------------------------------------------------------

DECOMPOSED = ["cafe\u0301", "Tie\u0302\u0301ng Vie\u0323\u0302t", "\u1112\u1161\u11ab\u1100\u1173\u11af", "e\u0323\u0302", "A\u030a"]


@pytest.mark.parametrize("text", DECOMPOSED)
@pytest.mark.parametrize("kind", ["bytes", "byte-level", "byte-level, NFC", "sentencepiece, first", "sentencepiece, normalizer"])
def test_d7_decomposed_text_has_the_ids_of_the_library_and_comes_back(kind: str, text: str) -> None:
    import unicodedata

    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert ids == tokenizer.inner.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids).strip(" ") == (unicodedata.normalize("NFC", text) if kind.endswith("NFC") else text)


def test_d7_a_normalizer_may_delete_and_join_characters() -> None:
    from tokenizers import Regex, normalizers

    from kinds import byte_level

    for normalizer, text in (
        (normalizers.Replace("\u200b", ""), "a\u200bb"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "Tiếng"),
        (normalizers.Replace(Regex("th"), "þ"), "the thing"),
        (normalizers.Lowercase(), "İ"),
    ):
        inner = byte_level()
        inner.normalizer = normalizer
        tokenizer = Tokenizer(inner)
        assert tokenizer.encode(text) == inner.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == normalizer.normalize_str(text)


def test_d7_what_a_vocabulary_drops_is_still_refused() -> None:
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    inner = tokenizers.Tokenizer(models.BPE({"c": 0, "a": 1, "f": 2, "ca": 3}, [("c", "a")]))
    inner.pre_tokenizer, inner.normalizer = pre_tokenizers.WhitespaceSplit(), normalizers.NFC()
    assert Tokenizer(inner).encode("caf ca") == [3, 2, 3]
    with pytest.raises(InputError, match=r"no token for 'é' \(U\+00E9\)"):
        Tokenizer(inner).encode("cafe\u0301")
    small = Tokenizer.bpe("caf\u00e9 " * 9, 9)
    small.inner.normalizer = normalizers.NFC()
    assert small.decode(small.encode("cafe\u0301")) == "café"
    with pytest.raises(InputError, match=r"no token for 'x'"):
        small.encode("x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["start", "inside"])
def test_d19_a_lone_surrogate_is_no_text(kind: str, place: str) -> None:
    with pytest.raises(InputError, match="not valid UTF-8 at character 2"):
        KINDS[kind].encode("a\ud800b", "inside" if place == "inside" else "start")
