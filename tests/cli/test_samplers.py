"""`dlm samplers`: the registry, whole and without torch."""

from __future__ import annotations

import json

from conftest import Dlm
from dlm.sampling import registry


def test_every_sampler_stands_in_the_table(dlm: Dlm) -> None:
    code, out, _ = dlm("samplers")
    assert code == 0
    for one in registry.known():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [one.usage] and one.about in line]
        assert ("yes" in line.split()[1:2]) == one.exact_by_default
    assert "(threshold 0.9)" in out
    assert "(draft_tokens 8, tolerance 0)" in out


def test_the_record_names_every_setting(dlm: Dlm) -> None:
    code, out, err = dlm("samplers", "--json")
    record = json.loads(out)
    assert code == 0
    assert "first-hitting" in err
    assert record["format"] == 1
    assert [(one["name"], one["noise"]) for one in record["samplers"]] == [(one.name, one.noise) for one in registry.known()]
    (heads,) = [one for one in record["samplers"] if one["name"] == "heads"]
    assert heads["parameters"][0] == {"name": "stride", "default": 4, "range": "[1, 257]"}
    assert heads["exact"] is True


def test_the_help_of_generate_names_every_sampler(dlm: Dlm) -> None:
    _, out, _ = dlm("generate", "--help")
    assert all(one.usage in out for one in registry.known())
    assert max(map(len, out.splitlines())) <= 80
