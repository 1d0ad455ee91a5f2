"""Conventions of the command line: old spellings, lists, usage errors, and answers that need no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dlm as package
from conftest import Dlm
from dlm.cli.app import app, listed

SOURCE = str(Path(package.__file__).parents[1])
LIGHT = """
import sys
sys.argv = ["dlm", *sys.argv[1:]]
from dlm import cli
try:
    cli.main()
except SystemExit as left:
    print("exit", left.code or 0, "torch" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["list"], 0),
        (["samplers"], 0),
        (["generate", "--help"], 0),
        (["generate", "--steps", "0"], 2),
        (["generate", "--temprature", "1"], 2),
        (["chat", "--max-new-tokens", "0"], 2),
        (["sing"], 2),
        (["generate", "--model", "nosuch"], 2),
        (["generate", "--dtype", "float8"], 2),
        (["chat", "nosuch"], 2),
        (["serve", "nosuch"], 2),
        (["train", "nosuch"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_lists_and_bad_arguments_need_no_torch(words: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, env={"PYTHONPATH": SOURCE})
    assert done.stdout.splitlines()[-1:] == [f"exit {code} False"], done.stderr


def test_version(dlm: Dlm) -> None:
    code, out, _ = dlm("--version")
    assert code == 0
    assert out.startswith(f"dlm {package.__version__} (Python ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("sing",), "no such command 'sing'; see dlm --help"),
        (("generate", "--temprature", "1"), "--temperature"),
        (("generate", "--steps", "many"), "'--steps'"),
        (("schedule", "serch"), "Did you mean 'search'? (see dlm schedule --help)"),
        (("generate", "--device", "cdua"), "no device 'cdua' here; did you mean cuda?"),
        (("eval",), "missing argument 'MODEL'; see dlm eval --help"),
        (("train", "--out"), "'--out' requires an argument"),
    ],
)
def test_a_usage_error_is_one_line(dlm: Dlm, words: tuple[str, ...], told: str) -> None:
    assert told in dlm.told(*words)


def test_every_verb_has_a_place_in_the_help(dlm: Dlm) -> None:
    assert "More" not in {
        *(one.rich_help_panel for one in app.registered_commands),
        *(one.rich_help_panel for one in app.registered_groups),
    }


@pytest.mark.parametrize("old", ["--base", "--model", "-m"])
def test_an_option_that_became_the_argument_works_with_a_warning(dlm: Dlm, masked_dir: Path, old: str) -> None:
    new = dlm("chat", str(masked_dir))
    code, out, err = dlm("chat", old, str(masked_dir))
    warning, error = err.splitlines()
    assert warning == f"warning: {old} {masked_dir} is an old spelling, which the next version drops: write dlm chat {masked_dir}"
    assert (code, out, f"{error}\n") == new
    assert dlm("chat", f"{old}={masked_dir}") == (code, out, err)


def test_an_argument_is_not_given_twice(dlm: Dlm) -> None:
    assert "MODEL is given twice" in dlm.told("chat", "one", "--base", "two")


def test_an_option_of_another_name_works_with_a_warning(dlm: Dlm) -> None:
    for words in (("--new", "1"), ("--new=1",)):
        code, _, err = dlm("bench", "decode", *words)
        assert code == 2
        assert "warning: --new is an old spelling, which the next version drops: write --max-new-tokens\n" in err
        assert "'--max-new-tokens': must be at least 2, got 1" in err


def test_two_options_became_arguments(dlm: Dlm) -> None:
    code, _, err = dlm("schedule", "cost", "H", "--light", "none", "--heavy", "nowhere")
    assert code == 2
    assert "write dlm schedule cost nowhere\n" in err
    assert "no checkpoint 'nowhere'" in err


def test_nothing_after_two_dashes_is_an_option(dlm: Dlm) -> None:
    code, _, err = dlm("chat", "--", "--base")
    assert code == 2
    assert "warning" not in err
    assert "'--base'" in err


@pytest.mark.parametrize(
    ("words", "parts", "warns"),
    [
        ("lookup:4,strided:4", ["lookup:4", "strided:4"], False),
        (" topk , ancestral,", ["topk", "ancestral"], False),
        ("lookup:8:0.2,draft:int4:auto", ["lookup:8:0.2", "draft:int4:auto"], False),
        ("lookup:4;strided:4", ["lookup:4", "strided:4"], True),
        ("ar,ngram;strided:4x16", ["ar", "ngram", "strided:4x16"], True),
        ("lookup:8,0.2;draft:int4,auto", ["lookup:8:0.2", "draft:int4:auto"], True),
        ("1,4,16", ["1", "4", "16"], False),
        ("", [], False),
    ],
)
def test_lists_take_commas(capsys: pytest.CaptureFixture[str], words: str, parts: list[str], warns: bool) -> None:
    assert listed(words, "--methods") == parts
    err = capsys.readouterr().err
    assert err.startswith("warning: --methods ") == warns
    assert err.endswith(f"write {','.join(parts)!r}\n") == warns
