"""Files are whole or not there, keep their permissions, and say in which format they are."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import dlm
from conftest import make_model
from dlm import files
from dlm.adapters import lora, medusa
from dlm.calibration.table import Calibration, Row
from dlm.errors import InputError
from dlm.formats import native
from dlm.model_scheduling.ledger import Ledger
from dlm.model_scheduling.outcome import Outcome
from dlm.model_scheduling.plan import ModelSchedule
from dlm.model_scheduling.saved import SavedSchedule
from dlm.train import state
from dlm.trajectory import Canvas, Trajectory


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_write_that_fails_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    files.write_text(path, "before")

    def stop() -> None:
        with files.replacing(path) as partial:
            partial.write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop()
    assert path.read_text() == "before"
    assert left(tmp_path) == ["text.txt"]


def test_several_files_come_in_their_order_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace: Callable[..., None] = os.replace

    def watched(source: Path, target: Path) -> None:
        moved.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with files.replacing_files(tmp_path, order=lambda file: file.name != "z") as temporary:
        for name in ("a", "z", "b"):
            (temporary / name).write_text(name)
        assert left(tmp_path) == [temporary.name]
    assert moved[0] == "z"
    assert left(tmp_path) == ["a", "b", "z"]


def test_what_was_written_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    monkeypatch.setattr(os, "replace", lambda *names: synced.append(-1))
    files.write_bytes(tmp_path / "data", b"12345")
    assert synced == [5, -1]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "text", "x")
        with files.replacing(tmp_path / "tensors") as partial:
            save_file({}, partial)
            partial.chmod(0o600)
        (tmp_path / "other").write_text("x")
    finally:
        os.umask(before)
    modes = {(tmp_path / name).stat().st_mode for name in ("text", "tensors", "other")}
    assert len(modes) == 1


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "text"
    files.write_text(path, "x")
    path.chmod(0o640)
    files.write_text(path, "y")
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.read_text() == "y"


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / f"{files.PREFIX}abc").mkdir()
    (tmp_path / f"{files.PREFIX}abc" / "part").write_text("half")
    (tmp_path / "whole").write_text("x")
    files.sweep(tmp_path)
    assert left(tmp_path) == ["whole"]


def saving(path: Path) -> int:
    """A process in the middle of a save of this file."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with files.replacing(path) as partial:
            partial.write_text("half")
            os.write(told, b"x")
            time.sleep(60)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    os.close(told)
    return child


def test_what_a_killed_save_left_is_swept_at_the_next_save_of_the_same_file_alone(tmp_path: Path) -> None:
    """Not while the process lives, and not what another run left."""
    children = [saving(tmp_path / name) for name in ("run.traj", "other.traj")]
    try:
        assert len(left(tmp_path)) == 2
        files.sweep(tmp_path)
        files.write_text(tmp_path / "run.traj", "whole")
        assert len(left(tmp_path)) == 3
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    files.write_text(tmp_path / "run.traj", "whole")
    (other,) = [name for name in left(tmp_path) if name.startswith(files.PREFIX)]
    assert (tmp_path / other / "other.traj").read_text() == "half"
    files.sweep(tmp_path)
    assert left(tmp_path) == ["run.traj"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[" * 100_000, "nested too deep"),
        (b"1" * 5000, "is damaged"),
    ],
    ids=["half", "no text", "deep", "long integer"],
)
def test_damaged_json_gets_one_line(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(InputError, match=reason) as told:
        files.read_json(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(told.value)
    assert "\n" not in str(told.value)


def test_json_that_cannot_be_read_gets_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read .No such file"):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"cannot be read .Is a directory"):
        files.read_json(tmp_path)


# Every file with a format number: (how it is written, its name, how it is read).


def _checkpoint(directory: Path) -> Callable[[], object]:
    make_model().save_pretrained(directory)
    return lambda: native.load_config(directory)


def _adapter(directory: Path) -> Callable[[], object]:
    lora.save_adapter(directory, make_model().network, lora.AdapterConfig())
    return lambda: lora.load_config(directory)


def _heads(directory: Path) -> Callable[[], object]:
    network = make_model("autoregressive").network
    config = medusa.HeadsConfig(fingerprint=lora.fingerprint(network))
    medusa.save_heads(directory, medusa.Heads(network, config), config)
    return lambda: medusa.load_heads(directory, network)


def _calibration(directory: Path) -> Callable[[], object]:
    Calibration([Row({}, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, True)], {}).save(directory)
    return lambda: Calibration.load(directory)


def _schedule(directory: Path) -> Callable[[], object]:
    SavedSchedule(ModelSchedule.parse("L0.5 H0.5"), {"L": "x"}, 4).save(directory)
    return lambda: SavedSchedule.load(directory)


JSON = {
    "config.json": _checkpoint,
    "adapter.json": _adapter,
    "heads.json": _heads,
    "calibration.json": _calibration,
    "schedule.json": _schedule,
}


@pytest.mark.parametrize("name", JSON)
def test_json_files_say_their_format_and_older_ones_are_read(tmp_path: Path, name: str) -> None:
    read = JSON[name](tmp_path)
    data = json.loads((tmp_path / name).read_text())
    assert data["format"] == 1
    assert data["dlm_version"] == dlm.__version__
    now = repr(read())
    del data["format"], data["dlm_version"]
    (tmp_path / name).write_text(json.dumps(data))
    assert repr(read()) == now


@pytest.mark.parametrize("name", JSON)
def test_json_files_of_a_later_format_say_who_writes_them(tmp_path: Path, name: str) -> None:
    read = JSON[name](tmp_path)
    data = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(data | {"format": 2, "dlm_version": "9.1.0"}))
    with pytest.raises(InputError, match=rf"{name} has format 2, which dlm 9\.1\.0 writes; dlm .* reads up to 1: upgrade dlm"):
        read()
    (tmp_path / name).write_text(json.dumps(data | {"format": "new"}))
    with pytest.raises(InputError, match=rf"{name} is damaged .its format is 'new'"):
        read()


def test_a_trajectory_of_a_later_format_says_who_writes_it(tmp_path: Path) -> None:
    path, canvas = tmp_path / "run.traj", Canvas.from_rows([[1, 2]], fill=0)
    run = Trajectory(canvas.tokens_BT, canvas, pieces={1: "a", 2: "b"}, mask_id=0, meta={})
    run.save(path)
    rewrite(path, format=None, dlm_version=None)  # from before there were numbers
    assert Trajectory.load(path).text() == "ab"
    rewrite(path, format=2)
    with pytest.raises(InputError, match=r"run\.traj has format 2, which a later version of dlm writes"):
        Trajectory.load(path)


def test_a_training_state_of_a_later_format_says_who_writes_it(tmp_path: Path) -> None:
    path = tmp_path / state.FILE
    state.write(path, {}, {"step": 3})
    assert state.read_meta(path)["format"] == 1
    save_file({}, path, metadata={"meta": json.dumps({"step": 3})})  # from before there were numbers
    assert "format" not in state.read_meta(path)
    assert state.read_meta(path)["step"] == 3
    state.write(path, {}, {"step": 3, "format": 2})
    with pytest.raises(InputError, match=rf"training\.safetensors has format 2, which dlm {dlm.__version__} writes"):
        state.read_meta(path)


def test_a_file_that_cannot_grow_is_an_error_of_the_system(tmp_path: Path) -> None:
    """As a full disk: safetensors tells the error in words of its own."""
    path, canvas = tmp_path / "run.traj", Canvas.from_rows([[1] * 4096], fill=0)
    run = Trajectory(canvas.tokens_BT, canvas, pieces={1: "a"}, mask_id=0, meta={})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large") as raised:
            run.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_where_a_file_can_be_written(tmp_path: Path) -> None:
    files.check_target(tmp_path / "run.traj")
    files.check_target(tmp_path / "a" / "b" / "card.json", makes=True)
    (tmp_path / "file").touch()
    for path, makes, told in (
        (tmp_path, False, "is a directory"),
        (tmp_path / "a" / "run.traj", False, "no directory"),
        (tmp_path / "file" / "card.json", True, "no directory"),
    ):
        with pytest.raises(InputError, match=told):
            files.check_target(path, makes=makes)


def rewrite(path: Path, **changes: object) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = {key: value for key, value in (json.loads(metadata["header"]) | changes).items() if value is not None}
    save_file(load_file(path), path, metadata=metadata | {"header": json.dumps(header)})


def test_a_line_after_one_that_was_cut_short_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert list(files.json_lines(path)) == []
    for value in ({"a": 1}, [2, "\u00fc"]):
        files.append_json(path, value)
    assert list(files.json_lines(path)) == [(1, {"a": 1}), (2, [2, "\u00fc"])]
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    files.append_json(path, 3)
    assert list(files.json_lines(path)) == [(1, {"a": 1}), (3, 3)]
    path.write_bytes(whole[:-1])  # only the line break is missing
    files.append_json(path, 3)
    assert path.read_bytes() == whole + b"3\n"


def test_a_ledger_keeps_the_trial_after_a_kill(tmp_path: Path) -> None:
    first, second = (Outcome(name, (0, 2), {"bits": [1.0, 2.0]}, 1.0, 1.0, 1.0, {"H": 1.0}) for name in "HL")
    path = tmp_path / "ledger.jsonl"
    Ledger(path).add({}, first)
    path.write_text(path.read_text() + '{"format": 1, "sched')
    Ledger(path).add({}, second)
    assert [Ledger(path).find({}, name, (0, 2)) for name in "HL"] == [first, second]
