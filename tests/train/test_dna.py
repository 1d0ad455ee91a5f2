"""DNA: FASTA files as runs of bases, both strands, and a run and an evaluation on a small genome."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import Dlm
from dlm import bundled
from dlm.errors import InputError
from dlm.train import data_kinds, dna, recipes
from dlm.train.config import TrainConfig
from dlm.train.setup import resolve
from dlm.workflows.evaluate import evaluate
from goldens import GOLDEN

TOY = [f"--set={word}" for word in ("steps=2", "layers=1", "width=16", "heads=2", "window=16", "context=0", "batch=4", "warmup=1")]


def written(path: Path, text: str | bytes) -> dna.Fasta:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    found = data_kinds.find(str(path))
    assert isinstance(found, dna.Fasta)
    return found


def spelled(fasta: dna.Fasta) -> list[str]:
    return ["".join(dna.BASES[code] for code in run) for run in fasta.runs]


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        (">a\nACGT\nTT\n", ["ACGTTT"]),
        (">a\nacgtNnAC\n", ["ACGT", "AC"]),
        (">a desc >x\r\nACGT\r\nAC\r\n", ["ACGTAC"]),
        (">a\rAC\r>b\rGT", ["AC", "GT"]),
        ("\n>a\n>b\n\n>c\nAC\n\nGT\n>d\n", ["ACGT"]),
        (">rna\nACGUu\n", ["ACGTT"]),
        (">a\n; a comment\nACGT AC\t\n", ["ACGTAC"]),
        ("\ufeff>a\nNNACRYAC-GT.N\n", ["AC", "AC", "GT"]),
        (">\nACG", ["ACG"]),
        (">\u00e9\nA", ["A"]),
    ],
)
def test_fasta_is_read_into_runs_of_bases(tmp_path: Path, text: str, runs: list[str]) -> None:
    for name in ("x.fa", "X.FASTA", "x.fna.gz"):
        assert spelled(written(tmp_path / name, text)) == runs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (">p\nACGT\n>q\nMKV\nAELL\n", r"line 5, record 'q': 'E' is no code of a base"),
        (">a\nAC*T\n", r"line 2, record 'a': '\*'"),
        (b">a\nAC\x00T\n", r"line 2, record 'a': '\\x00'"),
        (">a\nAC\u00c4T\n", "line 2, record 'a': '\u00c4'"),
        ("ACGT\n", r"line 1: letters before the first header; a FASTA record begins with a line >NAME"),
        ("; old\n\nACGT\n>a\nAC\n", "line 3: letters before the first header"),
        ("", "holds no A, C, G or T"),
        (">a\n>b\n", "holds no A, C, G or T"),
        (">a\nNNNN\n", "holds no A, C, G or T"),
    ],
)
def test_no_fasta_of_dna_is_told_by_record_and_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        _ = written(tmp_path / "x.fa", text).runs


def test_a_damaged_file_of_gzip_is_told(tmp_path: Path) -> None:
    whole = gzip.compress(b">a\n" + b"ACGT" * 1000)
    for damaged in (whole[:-10], b">a\nACGT\n", whole[:20] + b"\xff" * 9 + whole[29:], b""):
        (tmp_path / "x.fa.gz").write_bytes(damaged)
        if damaged:
            with pytest.raises(InputError, match=r"x\.fa\.gz is no file of gzip"):
                _ = dna.find(str(tmp_path / "x.fa.gz")).runs


def test_the_last_bases_validate_and_no_window_crosses_a_run(tmp_path: Path) -> None:
    fasta = written(tmp_path / "x.fa", ">a\n" + "A" * 30 + "N" + "C" * 5 + "\n>b\n" + "G" * 40 + "T" * 25)
    assert [fasta.stream("train", 6, 0.25).lengths, fasta.stream("val", 6, 0.25).lengths] == [(30, 40), (25,)]
    assert fasta.stream("val", 5, 0.3).lengths == (30,)
    assert fasta.stream("all", 5, 0.3).lengths == (30, 5, 65)
    drawn = fasta.stream("train", 5, 0.25).draw(500, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 1 for row in drawn.tolist())
    assert set(drawn.unique().tolist()) == {0, 1, 2, 3}  # T from the other strand of A
    with pytest.raises(InputError, match=r"validation part of .*x\.fa has 25 tokens in its longest piece, less than one window of 26"):
        fasta.stream("val", 26, 0.25)
    with pytest.raises(InputError, match="known: train, val, all"):
        fasta.stream("test", 5, 0.25)


def test_the_reverse_complement_is_an_involution_that_keeps_bases() -> None:
    x_BT = torch.randint(4, (8, 33), generator=torch.Generator().manual_seed(0))
    other = dna.complement(x_BT)
    assert torch.equal(dna.complement(other), x_BT)
    assert set(other.unique().tolist()) <= set(range(4))
    assert "".join(dna.BASES[code] for code in dna.complement(torch.tensor([[0, 0, 1, 2, 3]]))[0]) == "ACGTT"


def test_each_draw_is_one_strand_or_the_other(tmp_path: Path) -> None:
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 400))
    path = tmp_path / "x.fa"
    written(path, f">a\n{text}\n")
    config = TrainConfig(data=str(path)).with_settings(["window=16", "context=0"])
    other = "".join("TGCA"["ACGT".index(c)] for c in reversed(text))

    def strands(augment: bool) -> list[bool]:
        stream = resolve(config.with_settings([f"augment={augment}"])).training
        rows = stream.draw(400, torch.Generator().manual_seed(1)).tolist()
        found = ["".join(dna.BASES[code] for code in row) for row in rows]
        assert all((row in text) != (row in other) for row in found)
        return [row in text for row in found]

    assert 150 < sum(strands(augment=True)) < 250
    assert all(strands(augment=False))


@pytest.mark.slow
def test_a_run_and_its_bound_in_bits_a_base(dlm: Dlm) -> None:
    text = "".join(np.random.default_rng(0).choice(list("acgtN"), 4000, p=(0.3, 0.2, 0.29, 0.2, 0.01)))
    Path("x.fa").write_text(f">a\n{text}\n")
    code, out, err = dlm("train", "--data", "x.fa", "--json", *TOY)
    assert code == 0, err
    run = json.loads(out)["model"]
    assert run == "runs/x"
    config = json.loads(Path(run, "config.json").read_text())
    assert config["network"]["conv"] == recipes.dna().network.conv  # the recipe of its kind of data
    assert config["network"]["vocab_size"] == 5
    code, out, err = dlm("eval", run, "--data", "x.fa", "--json")
    assert code == 0, err
    assert "bits per base" in err
    assert "per byte" not in err
    found = json.loads(out)
    assert found["unit"] == "base"
    assert found["bits_per_char"] == pytest.approx(found["nats_per_token"] / math.log(2))
    assert 1.9 < found["bits_per_char"] < 3  # two steps from nothing, at most two bits of entropy
    code, out, err = dlm("generate", "--template", "ACGT__TTA__CACGT", "--model", run, "--steps", "2")
    assert code == 0, err


def test_odd_letters_end_with_one_line_and_exit_code_2(dlm: Dlm, masked_dir: Path) -> None:
    Path("p.fa").write_text(">p\nMKVLAA\n")
    assert "p.fa, line 2, record 'p': 'L' is no code of a base" in dlm.told("train", "--data", "p.fa")
    Path("x.fa").write_text(">a\nACGT\n")
    assert "does not know the bases of x.fa: train a model with dlm train --data x.fa" in dlm.told(
        "eval", str(masked_dir), "--data", "x.fa"
    )
    assert "no data at y.fa" in dlm.told("train", "--data", "y.fa")


COUNTS = 1.886
"""Bits a base of the stretch by the best counts: tests/golden/dna/README.md."""


def test_the_bundled_model_scores_a_stretch_that_it_never_saw() -> None:
    told = re.search(r"<= ([\d.]+) bits per base", (bundled.models()["dna-tuberculosis"] / "README.md").read_text(encoding="utf-8"))
    assert told is not None
    found = evaluate("dna-tuberculosis", GOLDEN / "dna" / "stretch.fa", split="all")
    assert found.bits_per_char < COUNTS
    assert found.bits_per_char == pytest.approx(float(told[1]), abs=0.05)
