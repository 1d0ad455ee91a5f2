"""Conventions of the command line: old spellings, lists, usage errors, and answers that need no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dlm as package
from conftest import Dlm
from dlm.cli.app import app, listed
from dlm.cli.train import NOISES

SOURCE = str(Path(package.__file__).parents[1])
LIGHT = """
import contextlib, io, json, sys
from dlm import cli
for words in json.loads(sys.argv[1]):
    sys.argv = ["dlm", *words]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as left:
        print(json.dumps([words, left.code or 0, sorted({"torch", "transformers"} & sys.modules.keys()), said.getvalue()]))
"""
WITHOUT_TORCH: list[tuple[str, int, str]] = [  # the words of a command, its exit code, and a part of the error
    ("--help", 0, ""),
    ("--version", 0, ""),
    ("list", 0, ""),
    ("samplers", 0, ""),
    ("generate --help", 0, ""),
    ("pull nosuch", 2, "smollm2-135m"),
    ("generate --steps 0", 2, "'--steps'"),
    ("generate --temperature -1", 2, "'--temperature'"),
    ("generate --temprature 1", 2, "--temperature"),
    ("generate --length 100000000000", 2, "must lie in 1 .. 10,000,000"),
    ("generate --samples 1000000000", 2, "must lie in 1 .. 10,000"),
    ("generate --sampler magic", 2, "'magic' is unknown"),
    ("generate --sampler confidnce", 2, "did you mean confidence? dlm samplers lists all of them"),
    ("generate --sampler topk:3", 2, "has no setting"),
    ("generate --sampler confidence:high", 2, "'high' is no number"),
    ("generate --sampler lookup:x", 2, "write lookup"),
    ("generate --save missing/x.traj", 2, "no directory missing"),
    ("generate --save .", 2, "is a directory"),
    ("generate --save run.gif", 2, "dlm show run.traj --gif run.gif draws it"),
    ("generate --adapter missing", 2, "no adapter 'missing'"),
    ("generate --model nosuch", 2, "no checkpoint 'nosuch'"),
    ("generate --dtype float8", 2, "unknown dtype"),
    ("chat --max-new-tokens 0", 2, "'--max-new-tokens'"),
    ("chat nosuch", 2, "no checkpoint 'nosuch'"),
    ("serve nosuch", 2, "no checkpoint 'nosuch'"),
    ("train nosuch", 2, "shakespeare-mask"),
    ("train --data missing.txt", 2, "no data at missing.txt"),
    ("convert shakespeare-ar --data missing.txt", 2, "no data at missing.txt"),
    ("convert shakespeare-ar --data shakespeare --steps 0", 2, "'--steps'"),
    ("convert nosuch --data shakespeare", 2, "no checkpoint 'nosuch'"),
    ("eval shakespeare-mask --data missing.txt", 2, "no data at missing.txt"),
    ("eval shakespeare-mask --data shakespeare --split test", 2, "'--split'"),
    ("eval shakespeare-mask --data shakespeare --estimator magic", 2, "'--estimator'"),
    ("eval shakespeare-mask --data shakespeare --card .", 2, "is a directory"),
    ("eval shakespeare-mask --data shakespeare --against nosuch", 2, "no checkpoint 'nosuch'"),
    ("curse shakespeare-mask --sampler topk,magic", 2, "'magic' is unknown"),
    ("curse shakespeare-mask --plot missing/x.png", 2, "no directory missing"),
    ("calibrate shakespeare-mask --samples 1", 2, "'--samples'"),
    ("schedule search shakespeare-mask nosuch", 2, "no checkpoint 'nosuch'"),
    ("schedule search shakespeare-mask shakespeare-mask-2 --saved 2", 2, "'--saved'"),
    ("settle missing.traj", 2, "dlm generate --save missing.traj"),
    ("show missing.traj", 2, "dlm generate --save missing.traj"),
    ("verify shakespeare-mask --cases missing.json", 2, "'missing.json' does not exist"),
    ("bench decode --methods magic", 2, "'magic' is unknown"),
    ("bench decode --prompts missing.txt", 2, "no prompts at missing.txt"),
    ("sing", 2, "no such command"),
]


def test_help_lists_and_bad_arguments_need_no_torch(tmp_path: Path) -> None:
    commands = json.dumps([words.split() for words, _, _ in WITHOUT_TORCH])
    environment = {"PYTHONPATH": SOURCE, "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", LIGHT, commands], cwd=tmp_path, capture_output=True, text=True, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(WITHOUT_TORCH), done.stderr
    for (words, code, told), (_, left, loaded, err) in zip(WITHOUT_TORCH, found, strict=True):
        assert (left, loaded) == (code, []), (words, err)
        assert told in err, words
        assert len(err.splitlines()) == bool(code), err


def test_the_estimators_of_the_option_are_those_that_there_are() -> None:
    from dlm.cli.evaluate import ESTIMATORS
    from dlm.evaluation import likelihood

    assert ESTIMATORS == likelihood.ESTIMATORS


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
        (("generate", "--device", "mps:99"), "use --device cpu"),
        (("train", "sudoku-4", "--set", "steps=many"), "--set steps=many: 'many' is no whole number"),
        (("train", "sudoku-4", "--set", "lr=fast"), "--set lr=fast: 'fast' is no number"),
        (("train", "sudoku-4", "--set", "levels=0,high"), "'high' is no number"),
        (("train", "sudoku-4", "--out", __file__), "is a file: --out is a directory"),
        (("eval",), "missing argument 'MODEL'; see dlm eval --help"),
        (("train", "--out"), "'--out' requires an argument"),
    ],
)
def test_a_usage_error_is_one_line(dlm: Dlm, words: tuple[str, ...], told: str) -> None:
    assert told in dlm.told(*words)


def test_the_help_of_training_names_every_noise(dlm: Dlm) -> None:
    from dlm.noise.process import PROCESSES, SETTING

    words = [f"{name}[:{'share' if name in ('hybrid', 'gidd') else SETTING[name]}]" if name in SETTING else name for name in PROCESSES]
    assert NOISES.split(" | ") == [word for word in words if word != "score"]  # of SEDD's checkpoints, which are not trained here


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


def test_the_schedule_stood_before_the_models(dlm: Dlm) -> None:
    code, _, err = dlm("schedule", "cost", "L0.5 H0.5", "nowhere", "none")
    assert code == 2
    assert "write dlm schedule cost nowhere none 'L0.5 H0.5'\n" in err
    assert "no checkpoint 'nowhere'" in err
    assert "missing argument 'SCHEDULE'" in dlm.told("schedule", "cost", "shakespeare-mask", "shakespeare-mask-2")


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
