"""Text that is shown is never taken back, and ends where it should."""

from __future__ import annotations

import random

import pytest

from dlm.serve.protocol.writer import Writer
from dlm.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()


def shown(writer: Writer, ids: list[int], at_once: int) -> list[str]:
    parts = [writer.add(ids[i : i + at_once]) for i in range(0, len(ids), at_once)]
    return [*parts, writer.finish()]


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
def test_half_a_character_is_never_shown(at_once: int) -> None:
    text = "naïve 漢字 🙂 e\u0301"
    parts = shown(Writer(BYTES, BYTES.encode("é漢")), BYTES.encode(text), at_once)
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


def test_pieces_add_up_and_say_where_they_begin() -> None:
    writer = Writer(BYTES, [])
    text = "a漢b"
    shown(writer, BYTES.encode(text), 1)
    assert [piece.text for piece in writer.pieces] == ["a", "", "", "漢", "b"]
    assert [piece.offset for piece in writer.pieces] == [0, 1, 1, 1, 2]


def test_bytes_that_are_no_character_are_shown_at_the_end_at_last() -> None:
    ids = BYTES.encode("a漢")[:-1]
    assert shown(Writer(BYTES, []), ids, 1) == ["a", "", "", "\ufffd"]
    ids = [*ids, *BYTES.encode("b")]
    assert "".join(shown(Writer(BYTES, []), ids, 1)) == BYTES.decode(ids)


def test_a_stop_string_is_cut_before_it_begins() -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("ab漢") for _ in range(20))
        stops = ["".join(draw.choice("ab漢") for _ in range(draw.randint(1, 4))) for _ in range(2)]
        end = next((end for end in range(21) if any(stop in text[:end] for stop in stops)), None)  # when one has been completed
        expected = text if end is None else text[: min(text[:end].find(stop) for stop in stops if stop in text[:end])]
        at_once = draw.randint(1, 4)
        writer = Writer(BYTES, [], stops=stops)
        so_far = ""
        for part in shown(writer, BYTES.encode(text), at_once):
            so_far += part
            assert expected.startswith(so_far), (text, stops)
        assert so_far == expected
        assert writer.finished == ("" if end is None else "stop")
        assert "".join(piece.text for piece in writer.pieces).startswith(so_far)


def test_an_end_token_is_no_text() -> None:
    writer = Writer(BYTES, [], frozenset(BYTES.encode("!")))
    assert shown(writer, BYTES.encode("ab!cd"), 2) == ["ab", "", "", ""]
    assert writer.finished == "stop"


def test_a_stop_string_that_is_not_completed_is_shown() -> None:
    assert shown(Writer(BYTES, [], stops=["abc"]), BYTES.encode("xab"), 1) == ["x", "", "", "ab"]
