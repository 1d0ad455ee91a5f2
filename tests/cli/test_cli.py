"""The command line as a user meets it: output, exit codes, one clear line for what went wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bases import publish, tokenizer, transformer
from conftest import TEXT, Dlm
from dlm import bundled, cli
from dlm.language_model.generation import Run
from dlm.trajectory import Trajectory


@pytest.mark.parametrize("sampler", ["ancestral", "topk", "confidence"])
def test_generate_prints_the_text_and_the_record(dlm: Dlm, masked_dir: Path, sampler: str) -> None:
    words = ("generate", "ROMEO:", "--model", str(masked_dir), "--length", "50", "--steps", "8", "--sampler", sampler, "--seed", "3")
    code, out, _ = dlm(*words)
    assert code == 0
    assert out.startswith("ROMEO:")
    assert len(out) == 51
    code, again, _ = dlm(*words, "--json")
    record = json.loads(again.splitlines()[-1])
    assert record["text"] == out[:-1]
    names = {"text", "tokens", "seconds", "forwards", "tokens_per_forward", "steps", "sampler", "seed", "model"}
    assert set(record) == names
    assert record["tokens"] == 44
    assert record["sampler"] == sampler
    assert record["tokens_per_forward"] == pytest.approx(44 / record["forwards"])


def test_watch_into_a_pipe_prints_the_text_alone(dlm: Dlm, masked_dir: Path) -> None:
    words = ("generate", "--model", str(masked_dir), "--length", "20", "--steps", "4")
    assert dlm(*words, "--watch")[1] == dlm(*words)[1]
    assert "\x1b" not in dlm(*words, "--watch")[1]


def test_template_and_suffix_fill_holes(dlm: Dlm, masked_dir: Path) -> None:
    _, out, _ = dlm("generate", "--model", str(masked_dir), "--template", "ROMEO: ____ love", "--steps", "4")
    assert out.startswith("ROMEO: ")
    assert out.endswith(" love\n")
    assert len(out) == len("ROMEO: ____ love\n")
    assert "_" not in out
    _, out, _ = dlm("generate", "What", "--suffix", "breaks!", "--max-new-tokens", "5", "--model", str(masked_dir), "--steps", "4")
    assert out.startswith("What")
    assert out.endswith("breaks!\n")
    assert len(out) == 17


def test_autoregressive_model_by_the_same_verb(dlm: Dlm, autoregressive_dir: Path) -> None:
    code, out, _ = dlm("generate", "ROMEO:", "--model", str(autoregressive_dir), "--length", "50", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["sampler"] == "autoregressive"
    assert record["forwards"] == 44
    assert "fill holes" in dlm.told("generate", "--model", str(autoregressive_dir), "--template", "A_B")
    assert "diffusion" in dlm.told("generate", "--model", str(autoregressive_dir), "--sampler", "topk")


def test_a_directory_that_is_missing_is_told_before_the_text_is_written(
    dlm: Dlm, masked_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--model", str(masked_dir), "--length", "20", "--steps", "2")
    assert dlm("generate", *words, "--save", "run.traj")[0] == 0
    assert "there is no directory nowhere to write into" in dlm.told("show", "run.traj", "--html", "nowhere/run.html")
    monkeypatch.setattr(Run, "step", None)
    assert "there is no directory nowhere to write into" in dlm.told("generate", *words, "--save", "nowhere/run.traj")


def test_save_and_show(dlm: Dlm, masked_dir: Path, tmp_path: Path) -> None:
    _, text, _ = dlm("generate", "--model", str(masked_dir), "--length", "40", "--steps", "8", "--save", "run.traj")
    assert dlm("show", "run.traj")[1] == text
    assert dlm("show", "run.traj", "--html", "run.html", "--gif", "run.gif")[0] == 0
    assert (tmp_path / "run.html").stat().st_size > 1000
    assert (tmp_path / "run.gif").read_bytes()[:3] == b"GIF"
    (tmp_path / "bad.traj").write_bytes((tmp_path / "run.traj").read_bytes()[:200])
    assert "bad.traj" in dlm.told("show", "bad.traj")
    assert "no file" in dlm.told("show", "none.traj")


def test_eval_writes_a_card(dlm: Dlm, masked_dir: Path, autoregressive_dir: Path, text_file: Path, tmp_path: Path) -> None:
    words = ("eval", str(masked_dir), "--data", str(text_file), "--split", "all", "--json", "--against", str(autoregressive_dir))
    code, out, _ = dlm(*words)
    record = json.loads(out.splitlines()[-1])
    assert code == 0
    assert {"nats_per_token", "bits_per_char", "stderr", "is_bound", "tokens", "model"} <= set(record)
    assert record["is_bound"]
    assert not record["against"]["is_bound"]
    assert record["against"]["stderr"] == 0
    assert record["tokens"] == record["against"]["tokens"] == len(TEXT) // 32 * 32
    card = json.loads((tmp_path / record["card"]).read_text())
    assert card["figures"]["nats_per_token"] == record["nats_per_token"]
    assert {"settings", "seed", "data", "device", "dtype", "versions", "command"} <= set(card)
    assert json.loads(dlm(*words)[1].splitlines()[-1])["nats_per_token"] == record["nats_per_token"]


@pytest.mark.slow
def test_eval_of_a_long_window_by_pieces(dlm: Dlm, autoregressive_dir: Path, masked_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Each piece from its beginning: the loss that transformers finds on it."""
    theirs, ids, path = transformer("Llama"), tokenizer().encode(TEXT).ids, tmp_path / "llama"
    publish(theirs, path)
    code, out, err = dlm("eval", str(path), "--data", str(text_file), "--split", "all", "--window", "16", "--max-windows", "3", "--json")
    assert code == 0, err
    record, count = json.loads(out.splitlines()[-1]), len(ids) // 16
    x_BT = torch.tensor([ids[16 * i : 16 * i + 16] for i in (0, round((count - 1) / 2), count - 1)])
    with torch.no_grad():
        logp_BTV = theirs(x_BT[:, :-1]).logits.log_softmax(-1)
    nats = 3 * math.log(logp_BTV.shape[-1]) - float(logp_BTV.gather(2, x_BT[:, 1:, None]).sum())  # nothing is known of the first
    assert record["nats_per_token"] == pytest.approx(nats / 48, rel=1e-4)
    assert record["tokens"] == 48
    assert json.loads(Path(record["card"]).read_text())["settings"]["window"] == 16
    words = ("eval", str(autoregressive_dir), "--data", str(text_file), "--window")
    assert "reads 2 to 32 tokens" in dlm.told(*words, "33")
    assert "reads 2 to 32 tokens" in dlm.told(*words, "1")
    assert "is a diffusion model" in dlm.told("eval", str(masked_dir), "--data", str(text_file), "--window", "16")


def test_list_names_what_is_here_and_what_can_be_had(dlm: Dlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLM_CACHE", str(tmp_path))
    code, out, _ = dlm("list")
    assert code == 0
    assert "shakespeare-ar" in out
    assert "trained on tuberculosis.fa" in next(line for line in out.splitlines() if "dna-tuberculosis" in line)
    assert "not here yet: dlm pull smollm2-135m" in out
    (tmp_path / "smollm2-135m.gguf").write_bytes(bytes(3_000_000))
    assert f"3 MB at {tmp_path / 'smollm2-135m.gguf'}" in dlm("list")[1]
    for kind, known in (("model", bundled.models()), ("adapter", bundled.adapters()), ("data", bundled.datasets())):
        assert {line.split()[1] for line in out.splitlines() if line.split()[:1] == [kind]} == set(known)
    assert 'dlm generate "ROMEO:" --watch' in out.partition("next:")[2]
    grids = {line.split()[1] for line in out.splitlines() if "dlm solve" in line and line.startswith("model")}
    assert grids == {"arc-rules", "maze-9", "sudoku-4", "sudoku-9"}
    assert bundled.models().keys() - set(bundled.text_models()) == grids | {"dna-tuberculosis"}


def test_train_then_generate_then_resume(dlm: Dlm, text_file: Path, tmp_path: Path) -> None:
    small = [w for kv in ("layers=1", "heads=2", "width=16", "window=32", "context=8", "batch=4", "eval_windows=4") for w in ("--set", kv)]
    code, out, _ = dlm("train", "--data", str(text_file), "--out", "mine", "--set", "steps=4", *small, "--json")
    assert code == 0
    assert json.loads(out)["step"] == 4
    assert dlm("generate", "--model", "mine", "--length", "40", "--steps", "4")[0] == 0
    assert "--resume" in dlm.told("train", "--data", str(text_file), "--out", "mine", "--set", "steps=8", *small)
    assert dlm("train", "--data", str(text_file), "--out", "mine", "--set", "steps=8", *small, "--resume")[0] == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "mine" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 8


def test_bad_input_gets_one_line(dlm: Dlm, masked_dir: Path, text_file: Path, tmp_path: Path) -> None:
    model = ("--model", str(masked_dir))
    assert "shakespeare-mask" in dlm.told("train", "shakespear-mask")
    assert "\u00e9" in dlm.told("generate", "caf\u00e9", *model)
    assert "steps" in dlm.told("generate", *model, "--steps", "0")
    assert "temperature" in dlm.told("generate", *model, "--temperature", "-1")
    assert "'magic' is unknown" in dlm.told("generate", *model, "--sampler", "magic")
    assert "nothing to generate" in dlm.told("generate", "ROMEO:", *model, "--length", "4")
    assert "not both" in dlm.told("generate", *model, "--length", "40", "--max-new-tokens", "4")
    assert "no hole" in dlm.told("generate", *model, "--template", "ROMEO")
    assert "device" in dlm.told("generate", *model, "--device", "cuda:9")
    assert "no device" in dlm.told("generate", *model, "--device", "toaster")
    assert "no data" in dlm.told("train", "--data", "missing.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in dlm.told("train", "--data", "empty.txt")
    assert "empty" in dlm.told("eval", str(masked_dir), "--data", "empty.txt")
    (tmp_path / "short.txt").write_text("too short")
    assert "window" in dlm.told("train", "--data", "short.txt")
    assert "window" in dlm.told("eval", str(masked_dir), "--data", "short.txt")
    assert "known keys" in dlm.told("train", "--data", str(text_file), "--set", "colour=red")
    assert "lr" in dlm.told("train", "--data", str(text_file), "--set", "lr=fast")
    assert "resume" in dlm.told("train", "--data", str(text_file), "--out", "nowhere", "--resume")
    assert "split" in dlm.told("eval", str(masked_dir), "--data", str(text_file), "--split", "test")
    assert "estimator" in dlm.told("eval", str(masked_dir), "--data", str(text_file), "--estimator", "magic")


def test_a_prompt_longer_than_a_window_without_context_is_told(dlm: Dlm, masked_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "no-context"
    shutil.copytree(masked_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"context": 0}))
    assert "window" in dlm.told("generate", "A" * 40, "--model", str(copy), "--length", "60")


def test_broken_checkpoints_are_told(dlm: Dlm, masked_dir: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        shutil.copytree(masked_dir, tmp_path / name)
        return tmp_path / name

    cut = damaged("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    assert "truncated" in dlm.told("generate", "--model", str(cut))
    other = damaged("other")
    from dlm.text.tokenizer import Tokenizer

    Tokenizer.characters("abc").save(other / "tokenizer.json")
    assert "different checkpoints" in dlm.told("generate", "--model", str(other))
    foreign = damaged("foreign")
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    assert "llama" in dlm.told("generate", "--model", str(foreign))
    assert "no checkpoint" in dlm.told("generate", "--model", "nothing-like-it")


def test_usage_errors_exit_with_2(dlm: Dlm) -> None:
    assert dlm("generate", "--steps", "many")[0] == 2
    assert dlm("sing")[0] == 2


def test_no_space_left_is_told(dlm: Dlm, masked_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Trajectory, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    words = ("generate", "--model", str(masked_dir), "--length", "20", "--steps", "2")
    text = dlm(*words)[1]
    monkeypatch.setattr(Trajectory, "save", full)
    code, out, err = dlm(*words, "--save", "x.traj")
    assert (code, out) == (2, text)  # the text is not lost
    assert "no space left" in err.splitlines()[-1]


THREE_FRAMES = """
import signal, sys
from dlm import cli
from dlm.trajectory import Trajectory
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
append = Trajectory.append
def told(self, *rest, **more):
    append(self, *rest, **more)
    if len(self) == 3:
        print("three frames", file=sys.stderr, flush=True)
Trajectory.append = told
cli.main()
"""


@pytest.mark.slow
def test_ctrl_c_keeps_the_frames_so_far(masked_dir: Path, tmp_path: Path) -> None:
    words = ["generate", "--model", str(masked_dir), "--length", "60000", "--save", "long.traj"]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, "-c", THREE_FRAMES, *words]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "three frames\n"
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "long.traj" in err
    assert len(Trajectory.load(tmp_path / "long.traj")) >= 3
