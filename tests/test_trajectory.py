"""A run is kept whole: what went in comes out, from memory and from a file, at any moment of it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from dlm.errors import InputError
from dlm.spelling import Spelling
from dlm.trajectory import Canvas, Frame, Trajectory

MASK = 7
PIECES = {token: f"<{token}>" for token in range(MASK)}


@st.composite
def runs(draw: st.DrawFn) -> tuple[Canvas, list[Frame]]:
    """Any frames, tokens that change back included; `settled` only ever grows, as a promise does."""
    rows, length, count = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 6))
    grid = st.lists(st.lists(st.integers(0, MASK), min_size=length, max_size=length), min_size=rows, max_size=rows)
    holes = st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows)
    widths = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    valid_BT = torch.arange(length) < torch.tensor(widths)[:, None]
    canvas = Canvas(torch.tensor(draw(grid)), torch.tensor(draw(holes)) & valid_BT, valid_BT)
    settled_BT, frames, has_drafts = ~canvas.free_BT, [], draw(st.booleans())
    drafts = st.lists(st.lists(st.integers(-1, MASK - 1), min_size=length, max_size=length), min_size=rows, max_size=rows)
    for k in range(count):
        settled_BT = settled_BT | torch.tensor(draw(holes))
        t_B = torch.tensor(draw(st.lists(st.floats(0, 1), min_size=rows, max_size=rows)), dtype=torch.float64)
        model, forwards = draw(st.sampled_from(["big", "small"])), k + draw(st.integers(1, 3))
        draft_BT = torch.tensor(draw(drafts)) if has_drafts else None
        frames.append(Frame(torch.tensor(draw(grid)), settled_BT, t_B, model, forwards, draft_BT=draft_BT))
    return canvas, frames


def recorded(canvas: Canvas, frames: Sequence[Frame]) -> Trajectory:
    start_BT = torch.where(canvas.free_BT, MASK, canvas.tokens_BT)
    trajectory = Trajectory(start_BT, canvas, pieces=PIECES, mask_id=MASK, meta={"seed": 3})
    for k, frame in enumerate(frames):
        trajectory.append(frame, seconds=k / 4)
    return trajectory


def last_change(states: Sequence[Tensor]) -> Tensor:
    last_BT = torch.zeros_like(states[0])
    for k in range(1, len(states)):
        last_BT[states[k] != states[k - 1]] = k
    return last_BT


def assert_holds(trajectory: Trajectory, canvas: Canvas, frames: Sequence[Frame]) -> None:
    start_BT = torch.where(canvas.free_BT, MASK, canvas.tokens_BT)
    got = list(trajectory.frames())
    assert len(got) == len(trajectory) == len(frames) + 1
    assert torch.equal(got[0].tokens_BT, start_BT)
    assert torch.equal(got[0].settled_BT, ~canvas.free_BT)
    assert got[0].t_B.tolist() == [1.0] * len(start_BT)
    assert got[0].forwards == 0
    for k, (ours, theirs) in enumerate(zip(frames, got[1:], strict=True), 1):
        assert torch.equal(ours.tokens_BT, theirs.tokens_BT)
        assert torch.equal(ours.settled_BT, theirs.settled_BT)
        assert torch.equal(ours.t_B.float(), theirs.t_B.float())
        assert (ours.model, ours.forwards) == (theirs.model, theirs.forwards)
        assert (ours.draft_BT is None) == (theirs.draft_BT is None)
        if ours.draft_BT is not None and theirs.draft_BT is not None:
            assert torch.equal(ours.draft_BT, theirs.draft_BT)
        rows, positions, tokens = trajectory.changes(k)
        assert torch.equal(ours.tokens_BT[rows, positions], tokens)
        assert len(tokens) == int((ours.tokens_BT != got[k - 1].tokens_BT).sum())
    assert torch.equal(trajectory.settle_step(), last_change([frame.tokens_BT for frame in got]))
    assert torch.equal(trajectory.current_BT, got[-1].tokens_BT)
    for row in range(len(start_BT)):
        shown = trajectory.current_BT[row][canvas.valid_BT[row]].tolist()
        assert trajectory.text(row, mask="#") == "".join("#" if token == MASK else f"<{token}>" for token in shown)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_frames_come_out_as_they_went_in_from_memory_and_from_a_file(run: tuple[Canvas, list[Frame]]) -> None:
    canvas, frames = run
    trajectory = recorded(canvas, frames)
    assert_holds(trajectory, canvas, frames)
    with tempfile.TemporaryDirectory() as directory:
        trajectory.save(Path(directory) / "run.traj")
        assert [p.name for p in Path(directory).iterdir()] == ["run.traj"]
        again = Trajectory.load(Path(directory) / "run.traj")
        assert_holds(again, canvas, frames)
        assert torch.equal(again.free_BT, canvas.free_BT)
        assert torch.equal(again.valid_BT, canvas.valid_BT)
        assert again.seconds == [0.0, *(k / 4 for k in range(len(frames)))]
        assert again.mask_id == MASK
        assert again.meta == {"seed": 3}
        again.save(Path(directory) / "run.traj")
        assert_holds(Trajectory.load(Path(directory) / "run.traj"), canvas, frames)


@settings(max_examples=30, deadline=None)
@given(runs(), st.integers(0, 6))
def test_a_run_cut_short_is_a_whole_trajectory_and_can_go_on(run: tuple[Canvas, list[Frame]], cut: int) -> None:
    canvas, frames = run
    with tempfile.TemporaryDirectory() as directory:
        recorded(canvas, frames[:cut]).save(Path(directory) / "run.traj")
        again = Trajectory.load(Path(directory) / "run.traj")
        assert_holds(again, canvas, frames[:cut])
        again.spelling = Spelling.of(PIECES, MASK)  # the file knows only what it shows
        for k, frame in enumerate(frames[cut:]):
            again.append(frame, seconds=float(k))
        assert_holds(again, canvas, frames)


def hello() -> tuple[Canvas, list[Frame]]:
    canvas = Canvas.from_rows([[1, None, None], [2, None]], fill=MASK)
    settled_BT = ~canvas.free_BT
    frames = []
    for k, tokens in enumerate(([[1, 3, 7], [2, 7, 7]], [[1, 3, 4], [2, 3, 7]])):
        tokens_BT = torch.tensor(tokens)
        settled_BT = settled_BT | (tokens_BT != MASK)
        frames.append(Frame(tokens_BT, settled_BT, torch.tensor([0.5, 0.5]) * (1 - k), "m", k + 1))
    return canvas, frames


def text_grows() -> Trajectory:
    """Three forward passes on two rows: 3 and 4 drafted, 3 accepted and 5 in place of 4; then 6, which row 1 rejects."""
    canvas = Canvas.from_rows([[1, *[None] * 4], [2, *[None] * 4]], fill=MASK)
    texts = [[[1, 2, 7, 7, 7], [2, 2, 7, 7, 7]], [[1, 2, 3, 5, 7], [2, 2, 3, 7, 7]], [[1, 2, 3, 5, 6], [2, 2, 3, 4, 7]]]
    drafts = [[[-1, -1, 3, 4, -1], [-1] * 5], [[-1, -1, -1, -1, 6], [-1, -1, -1, 6, 0]], [[-1] * 5] * 2]
    frames = []
    for k, (tokens, draft) in enumerate(zip(texts, drafts, strict=True)):
        tokens_BT = torch.tensor(tokens)
        frames.append(Frame(tokens_BT, tokens_BT != MASK, torch.zeros(2), "m", k + 1, draft_BT=torch.tensor(draft)))
    return recorded(canvas, frames)


def test_accepted_and_rejected_draft_tokens(tmp_path: Path) -> None:
    made = text_grows()
    made.save(tmp_path / "run.traj")
    with safe_open(tmp_path / "run.traj", framework="pt") as file:  # the keys of files saved by earlier versions
        assert {"proposed_row", "proposed_position", "proposed_token", "proposed_count"} <= set(file.keys())
    for run in (made, Trajectory.load(tmp_path / "run.traj")):
        assert run.has_drafts
        assert (run.drafted_B.tolist(), run.accepted_B.tolist()) == ([3, 2], [2, 0])
        rejected = [[column.tolist() for column in run.rejected(k)] for k in range(4)]
        assert rejected == [[[], [], []], [[], [], []], [[0], [3], [4]], [[1, 1], [3, 4], [6, 0]]]
        assert run.piece(0) == "<0>"  # shown, though never part of the text


def test_a_run_without_drafts_has_the_file_that_it_always_had(tmp_path: Path) -> None:
    recorded(*hello()).save(tmp_path / "run.traj")
    with safe_open(tmp_path / "run.traj", framework="pt") as file:
        assert set(file.keys()) == {"row", "position", "token", "count", "start", "settled", "free", "valid", "t"}
    again = Trajectory.load(tmp_path / "run.traj")
    assert not again.has_drafts
    assert all(frame.draft_BT is None for frame in again.frames())
    assert [len(column) for k in range(3) for column in (*again.drafts(k), *again.rejected(k))] == [0] * 18


def test_the_file_holds_only_the_pieces_that_are_shown(tmp_path: Path) -> None:
    recorded(*hello()).save(tmp_path / "run.traj")
    with safe_open(tmp_path / "run.traj", framework="pt") as file:
        assert set(json.loads(file.metadata()["header"])["pieces"]) == {"1", "2", "3", "4"}
    again = Trajectory.load(tmp_path / "run.traj")
    assert {token: part.inner.decode() for token, part in again.spelling.parts.items()} == {token: PIECES[token] for token in (1, 2, 3, 4)}
    assert again.text(0) == "<1><3><4>"
    assert again.text(1) == "<2><3>"
    assert again.piece(MASK) == "█"
    assert again.piece(MASK, mask="_") == "_"
    assert again.piece(6) == "\ufffd"


def test_a_frame_of_another_shape_is_an_error() -> None:
    trajectory = recorded(*hello())
    tokens_BT = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="shape"):
        trajectory.append(Frame(tokens_BT, tokens_BT == 0, torch.zeros(2), "m", 3))
    assert len(trajectory) == 3


def test_a_frame_is_copied_and_the_clock_runs(tmp_path: Path) -> None:
    canvas, frames = hello()
    trajectory = recorded(canvas, [])
    kept = [frame.tokens_BT.clone() for frame in frames]
    for frame in frames:
        trajectory.append(frame)
        frame.tokens_BT.zero_()  # a sampler may go on writing into the tensor that it has shown
    trajectory.settle_step().zero_()
    assert torch.equal(trajectory.current_BT, kept[-1])
    assert [torch.equal(a, b.tokens_BT) for a, b in zip(kept, list(trajectory.frames())[1:], strict=True)] == [True, True]
    assert trajectory.settle_step().tolist() == [[0, 1, 2], [0, 2, 0]]
    assert 0.0 <= trajectory.seconds[1] <= trajectory.seconds[2]


def test_a_save_that_fails_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(*hello()).save(tmp_path / "run.traj")
    before = (tmp_path / "run.traj").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("dlm.files.os.replace", "dlm.trajectory.save_file"):
        other = recorded(hello()[0], [])
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(OSError, match="No space"):
                other.save(tmp_path / "run.traj")
        assert [p.name for p in tmp_path.iterdir()] == ["run.traj"]
        assert (tmp_path / "run.traj").read_bytes() == before


def told(path: Path) -> str:
    with pytest.raises(InputError) as error:
        Trajectory.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_truncated_file_is_told_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "run.traj"
    recorded(*hello()).save(path)
    whole = path.read_bytes()
    for keep in [*range(0, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:keep])
        assert "not a whole trajectory" in told(path), keep


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_file_with_a_wrong_byte_is_told_or_still_a_trajectory(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.traj"
        recorded(*hello()).save(path)
        raw = bytearray(path.read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
        with contextlib.suppress(InputError):
            again = Trajectory.load(path)
            assert len(list(again.frames())) == len(again)
            assert isinstance(again.text(1), str)


def test_another_safetensors_file_is_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert "not a trajectory" in told(tmp_path / "model.safetensors")
    (tmp_path / "text.traj").write_text("once upon a time")
    assert "not a whole trajectory" in told(tmp_path / "text.traj")
    save_file({"a": torch.zeros(3)}, tmp_path / "b.traj", metadata={"format": "dlm-trajectory-1", "header": "{}"})
    assert "not a whole trajectory" in told(tmp_path / "b.traj")


@given(st.lists(st.lists(st.one_of(st.none(), st.integers(0, MASK - 1)), max_size=5), min_size=1, max_size=4).filter(any))
@settings(max_examples=60, deadline=None)
def test_rows_become_a_canvas_padded_on_the_right(rows: list[list[int | None]]) -> None:
    canvas = Canvas.from_rows(rows, fill=MASK)
    width = max(map(len, rows))
    for b, row in enumerate(rows):
        padding = width - len(row)
        assert canvas.tokens_BT[b].tolist() == [MASK if x is None else x for x in row] + [MASK] * padding
        assert canvas.free_BT[b].tolist() == [x is None for x in row] + [False] * padding
        assert canvas.valid_BT[b].tolist() == [True] * len(row) + [False] * padding
    moved = canvas.to("cpu")
    assert torch.equal(moved.tokens_BT, canvas.tokens_BT)
    assert torch.equal(moved.free_BT, canvas.free_BT)


@pytest.mark.parametrize("rows", [[], [[]], [[], []]])
def test_an_empty_canvas_is_told(rows: list[list[int | None]]) -> None:
    with pytest.raises(InputError, match="empty canvas"):
        Canvas.from_rows(rows, fill=MASK)


def test_a_canvas_that_contradicts_itself_is_an_error() -> None:
    tokens_BT, yes_BT = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="padding"):
        Canvas(tokens_BT, yes_BT, torch.arange(3).expand(2, 3) < 2)
    with pytest.raises(ValueError, match="shape"):
        Canvas(tokens_BT, yes_BT[:, :2], yes_BT)
    with pytest.raises(ValueError, match="shape"):
        Canvas(tokens_BT[0], yes_BT[0], yes_BT[0])
