"""Every sampler that a user can pick has its line, and the line is for people."""

from __future__ import annotations

import re

from dlm.sampling import registry
from dlm.serve.engine.samplers import CONTINUING, MASKED, REPLACED


def test_every_word_has_its_line() -> None:
    assert [*MASKED] == [*registry.UNMASKING, registry.SPECULATIVE]
    assert [*REPLACED] == [*registry.REPLACING]
    assert {*CONTINUING} == {"autoregressive", *registry.STRIDED} - {"draft"}  # which needs the name of another model


def test_a_line_is_one_plain_sentence() -> None:
    for about in (*MASKED.values(), *REPLACED.values(), *CONTINUING.values()):
        assert re.fullmatch(r"[A-Z][a-z, :;'-]{20,99}\.", about), about  # no citation, no second sentence


def test_no_line_is_said_of_two() -> None:
    for lines in (MASKED, REPLACED, CONTINUING):
        assert len(set(lines.values())) == len(lines)
