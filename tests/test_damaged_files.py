"""Every file of JSON with damage of every kind: one line, which names the file; no traceback, no memory."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import make_model
from dlm import files
from dlm.adapters import distillation_data, lora, medusa
from dlm.calibration.table import Calibration, Row
from dlm.errors import InputError
from dlm.formats import huggingface, native
from dlm.formats.families import known
from dlm.language_model import load
from dlm.model_scheduling.ledger import Ledger
from dlm.model_scheduling.outcome import Outcome
from dlm.model_scheduling.plan import ModelSchedule
from dlm.model_scheduling.saved import SavedSchedule
from dlm.text import byte_level
from dlm.text.chat import ChatTemplate
from dlm.train import log, setup, state
from dlm.trajectory import Canvas, Frame, Trajectory
from dlm.viz import html
from dlm.workflows import verify

DEEP, LONG = "[" * 10_000 + "]" * 10_000, '{"a": ' + "9" * 5_000 + "}"
DAMAGE = {"deep": DEEP, "long": LONG, "cut": '{"a": ', "empty": "", "text": "no json", "bytes": "\udcff"}
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": native.load_config,
    "config.json of a base": huggingface.load,
    "config.json of a family": known.of,
    "generation_config.json": native.read_defaults,
    "model.safetensors.index.json": native.weights,
    "tokenizer_config.json": ChatTemplate.load,
    "special_tokens_map.json": ChatTemplate.load,
    "vocab.json": byte_level.read,
    "adapter.json": lora.load_config,
    "heads.json": lambda path: medusa.load_heads(path, make_model("autoregressive").network),
    "calibration.json": Calibration.load,
    "schedule.json": SavedSchedule.load,
    "cases.json": lambda path: verify.read_cases(path / "cases.json"),
    "clusters.json": lambda path: setup._from_file(path / "clusters.json", ["a"]),
    "texts.jsonl": lambda path: distillation_data.from_base(path / "texts.jsonl", None, 8),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", READERS)
def test_damage_gets_one_line(tmp_path: Path, name: str, kind: str) -> None:
    file = name.partition(" ")[0]
    (tmp_path / file).write_text(DAMAGE[kind], errors="surrogateescape")
    (tmp_path / "merges.txt").touch()
    with pytest.raises(InputError, match=file.partition(".")[0]) as error:
        READERS[name](tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", DAMAGE)
def test_lines_that_a_kill_may_have_cut_are_passed_over(tmp_path: Path, kind: str) -> None:
    """A ledger and a log: the damaged line is as if it were not there."""
    outcome = Outcome("H", (0, 2), {"bits": [1.0, 2.0]}, 1.0, 1.0, 1.0, {"H": 1.0})
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add({}, outcome)
    for name, line in (("ledger.jsonl", ""), ("log.jsonl", '{"step": 3, "loss": 1.0}\n')):
        with (tmp_path / name).open("a", errors="surrogateescape") as file:
            file.write(line + DAMAGE[kind] + "\n")
    assert Ledger(tmp_path / "ledger.jsonl").find({}, "H", (0, 2)) == outcome
    assert log.finished(tmp_path, 3)
    assert not log.finished(tmp_path, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": 3},
        {"seeds": [1]},
        {"seeds": [1, "a"]},
        {"figures": [1]},
        {"figures": {"a": ["b"]}},
        {"blocks": None},
        {"calls": 3},
        {"format": "x"},
    ],
    ids=str,
)
def test_a_ledger_with_other_types_gets_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    Ledger(tmp_path / "ledger.jsonl").add({}, Outcome("H", (0, 2), {"bits": [1.0, 2.0]}, 1.0, 1.0, 1.0, {"H": 1.0}))
    data = json.loads((tmp_path / "ledger.jsonl").read_text())
    (tmp_path / "ledger.jsonl").write_text(json.dumps(data | changes) + "\n")
    with pytest.raises(InputError, match="ledger"):
        Ledger(tmp_path / "ledger.jsonl")
    del data[next(iter(changes.keys() - {"format"}), "seconds")]
    (tmp_path / "ledger.jsonl").write_text(json.dumps(data) + "\n")
    with pytest.raises(InputError, match="lacks"):
        Ledger(tmp_path / "ledger.jsonl")


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("count", [10**9, 0, 2.5, "3", None, [3], True, float("inf")], ids=str)
def test_heads_of_any_count(tmp_path: Path, count: Any) -> None:
    network, begin = make_model("autoregressive").network, time.process_time()
    config = medusa.HeadsConfig(2, "base", lora.fingerprint(network))
    medusa.save_heads(tmp_path, medusa.Heads(network, config), config)
    change(tmp_path / "heads.json", count=count)
    with pytest.raises(InputError, match="heads"):
        medusa.load_heads(tmp_path, network)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 10**9},
        {"rank": 1.5},
        {"alpha": "2"},
        {"alpha": float("nan")},
        {"targets": "q"},
        {"targets": [3]},
        {"chain": 10**9},
        {"stride": 1e3},
    ],
    ids=str,
)
def test_adapters_with_other_types(tmp_path: Path, changes: dict[str, Any]) -> None:
    network = make_model("autoregressive").network
    config = lora.AdapterConfig(2, 4.0, ("q",), fingerprint=lora.fingerprint(network))
    (tmp_path / "adapter.json").write_text(
        json.dumps({"format": 1} | {name: getattr(config, name) for name in config.__dataclass_fields__})
    )
    change(tmp_path / "adapter.json", **changes)
    with pytest.raises(InputError, match="adapter"):
        lora.load_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": float("inf")},
        {"steps": 10**9},
        {"steps": 2.5},
        {"steps": "8"},
        {"steps": 0},
        {"steps": True},
        {"light": {"L": 3}},
        {"light": ["a"]},
        {"schedule": 3},
        {"schedule": "L1000000000 H1"},
        {"schedule": f"L{'9' * 400} H1"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_schedules_with_other_types(tmp_path: Path, changes: dict[str, Any]) -> None:
    SavedSchedule(ModelSchedule.parse("L0.5 H0.5"), {"L": "light"}, 8).save(tmp_path)
    assert SavedSchedule.load(tmp_path).steps == 8
    change(tmp_path / "schedule.json", **changes)
    with pytest.raises(InputError):
        SavedSchedule.load(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"calls": "2"}, {"bits": None}, {"options": 3}, {"options": {"nothing": 3}}, {"options": {"steps": "x"}}], ids=str
)
def test_calibrations_with_other_types(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_model().save_pretrained(tmp_path / "m")
    rows = [Row({"sampler": "ancestral", "steps": 4}, 4.0, 1.0, 2.0, 0.1, 3.0, 0.9, exact=True)]
    Calibration(rows, {}).save(tmp_path / "m")
    lm = load(str(tmp_path / "m"))
    lm.sampler(sampler="auto")
    data = json.loads((tmp_path / "m" / "calibration.json").read_text())
    data["rows"][0] |= changes
    (tmp_path / "m" / "calibration.json").write_text(json.dumps(data))
    with pytest.raises(InputError):
        lm.sampler(sampler="auto")


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_token_id": "0"},
        {"mask_token_id": 1.0},
        {"context": None},
        {"noise": []},
        {"noise": {"process": []}},
        {"training": 3},
        {"shift": 1},
    ],
    ids=str,
)
def test_configs_with_other_types(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_model().save_pretrained(tmp_path)
    change(tmp_path / "config.json", **changes)
    with pytest.raises(InputError, match="config"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "changes", [{"width": 32.0}, {"layers": "2"}, {"window": None}, {"rope_scaling": ["a"]}, {"experts": 3}, {"tied": "no"}], ids=str
)
def test_networks_with_other_types(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_model().save_pretrained(tmp_path)
    network = json.loads((tmp_path / "config.json").read_text())["network"]
    change(tmp_path / "config.json", network=network | changes)
    with pytest.raises(InputError, match="config"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "meta", [DEEP, LONG, "3", "{}", '{"step": "3", "config": {}}', '{"step": 3, "config": []}', '{"step": 3, "recent": 1}']
)
def test_a_training_state_with_damaged_meta(tmp_path: Path, meta: str) -> None:
    save_file({}, tmp_path / state.FILE, metadata={"meta": meta})
    with pytest.raises(InputError, match="training"):
        state.begin(tmp_path, "train", resume=True, optimizer="adamw")


def saved_run(path: Path) -> Path:
    canvas = Canvas.from_rows([[1, None, None], [1, 2, None]], fill=0)
    run = Trajectory(canvas.tokens_BT, canvas, pieces={1: "a", 2: "b"}, mask_id=0, meta={"model": "m"})
    tokens_BT = canvas.tokens_BT.clone()
    for column in (1, 2):
        tokens_BT = tokens_BT.clone()
        tokens_BT[:, column] = 2
        settled_BT = torch.arange(3).expand(2, 3) <= column
        run.append(Frame(tokens_BT, settled_BT, torch.tensor([0.5, 0.5]), "m", column, draft_BT=torch.full_like(tokens_BT, 1)))
    run.save(path)
    return path


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["header"])
        return found


def rewritten(path: Path, header: str, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    save_file(load_file(path) if tensors is None else tensors, path, metadata={"format": "dlm-trajectory-1", "header": header})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"pieces": {"1": None, "2": "b"}},
        {"pieces": None},
        {"pieces": {"9" * 5000: "a"}},
        {"mask_id": "0"},
        {"models": [1, 2, 3]},
        {"models": None},
        {"forwards": [0, 1.5, 2]},
        {"seconds": ["0", 1, 2]},
        {"seconds": [0, float("nan"), 1]},
        {"meta": [1]},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_trajectory_with_other_types(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = saved_run(tmp_path / "run.traj")
    assert Trajectory.load(path).text() == "abb"
    rewritten(path, json.dumps(header_of(path) | changes))
    with pytest.raises(InputError, match="run"):
        Trajectory.load(path)


@pytest.mark.parametrize("header", [DEEP, LONG, "3", ""], ids=["deep", "long", "number", "empty"])
def test_a_trajectory_with_a_damaged_header(tmp_path: Path, header: str) -> None:
    with pytest.raises(InputError, match="run"):
        Trajectory.load(rewritten(saved_run(tmp_path / "run.traj"), header))


def test_trajectories_changed_at_random_load_and_show_or_get_one_line(tmp_path: Path) -> None:
    """Two seconds of it: header values, entries of tensors, and bytes of the file."""
    rng, end, shown = random.Random(0), time.process_time() + 2, 0
    refusals: list[str] = []
    values = [None, -1, 0, 3, 10**9, 10**20, 1.5, float("nan"), "", "x", [], {}, [None], {"1": None}, True]
    while time.process_time() < end:
        path = saved_run(tmp_path / "run.traj")
        way = rng.randrange(3)
        if way == 0:
            header = header_of(path)
            header[rng.choice(list(header))] = rng.choice(values)
            rewritten(path, json.dumps(header))
        elif way == 1:
            header, tensors = header_of(path), load_file(path)
            tensor = tensors[rng.choice(list(tensors))]
            if tensor.numel():
                tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([-(2**31), -1, 0, 1, 5, 2**31 - 1])
            rewritten(path, json.dumps(header), tensors)
        else:
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(bytes(data))
        try:
            run = Trajectory.load(path)
        except InputError as error:
            refusals.append(str(error))
            continue
        assert [run.text(row) for row in range(len(run.start_BT))]
        assert len(list(run.frames())) == len(run)
        html.write_html([("run", run)], tmp_path / "run.html")
        shown += 1
    assert len(refusals) > 5
    assert shown > 5
    assert not [told for told in refusals if "\n" in told]


def test_parse_json_names_where(tmp_path: Path) -> None:
    assert files.parse_json("[1]", "x") == [1]
    for kind in ("deep", "long", "cut"):
        with pytest.raises(InputError, match=r"^x is damaged"):
            files.parse_json(DAMAGE[kind], "x")
