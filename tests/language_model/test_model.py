"""`dlm.load(...)` and what hangs on it: generation, streaming, streamers, callbacks, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dlm
from conftest import make_model
from dlm.trajectory import Frame, Trajectory


class Recorder:
    """A streamer as transformers defines it, with drafts."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(("put", value.tolist()))

    def put_draft(self, value: torch.Tensor) -> None:
        self.calls.append(("draft", value.tolist()))

    def end(self) -> None:
        self.calls.append(("end", []))


def test_same_seed_same_text_other_seed_other_text(masked_dir: Path) -> None:
    model = dlm.load(str(masked_dir))
    first, again, other = (model.generate("ROMEO:", length=60, steps=8, seed=s) for s in (0, 0, 1))
    assert first.text == again.text == str(first) != other.text
    assert first.text.startswith("ROMEO:")
    assert first.tokens == 54
    assert first.tokens_per_forward == pytest.approx(54 / first.forwards)


def test_stream_yields_frames_that_settle(masked_dir: Path) -> None:
    model = dlm.load(str(masked_dir))
    frames = list(model.stream("ROMEO:", length=60, steps=8, seed=0))
    settled = [int(f.settled_BT.sum()) for f in frames]
    assert settled == sorted(settled)
    assert settled[-1] == 60
    assert "█" in model.decode(frames[0])
    assert model.decode(frames[-1]) == model.generate("ROMEO:", length=60, steps=8, seed=0).text
    assert [f.forwards for f in frames] == list(range(1, len(frames) + 1))


def test_streamer_and_callback_see_every_step(masked_dir: Path) -> None:
    model, streamer, seen = dlm.load(str(masked_dir)), Recorder(), []

    def callback(trajectory: Trajectory, frame: Frame) -> None:
        seen.append((len(trajectory), frame.forwards))

    result = model.generate("ROMEO:", length=40, steps=8, streamer=streamer, callback=callback)
    kinds = [kind for kind, _ in streamer.calls]
    assert kinds == ["put", *["draft"] * result.forwards, "put", "end"]
    prompt, final = streamer.calls[0][1], streamer.calls[-2][1]
    assert model.tokenizer.decode(prompt) == "ROMEO:"
    assert model.tokenizer.decode(prompt + final) == result.text
    assert seen == [(k + 1, k) for k in range(1, result.forwards + 1)]


def test_the_streamer_of_transformers_works(masked_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streamers = pytest.importorskip("transformers.generation.streamers")
    model = dlm.load(str(masked_dir))

    class Decoder:
        def decode(self, ids: Any, **_: Any) -> str:
            return model.tokenizer.decode(torch.as_tensor(ids).flatten().tolist())

    result = model.generate("ROMEO:", length=40, steps=4, streamer=streamers.TextDiffusionStreamer(Decoder()))
    assert result.text.replace("\n", "") in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_save_and_load_round_trip(tmp_path: Path, objective: str) -> None:
    model = make_model(objective)
    model.save_pretrained(tmp_path / "copy")
    names = {p.name for p in (tmp_path / "copy").iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    again = dlm.LanguageModel.from_pretrained(str(tmp_path / "copy"))
    assert again.generate("A", length=40).text == model.generate("A", length=40).text
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["model_type"] == "dlm"
    assert config["mask_token_id"] == model.tokenizer.mask_id


def test_push_to_hub_uploads_the_directory(masked_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is out of reach of a test; what is handed to its client is checked."""
    import huggingface_hub

    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> str:
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            uploaded[repo_id] = {p.name for p in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert dlm.load(str(masked_dir)).push_to_hub("me/tiny") == "https://hub/me/tiny"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= uploaded["me/tiny"]


def test_long_text_window_by_window(masked_dir: Path) -> None:
    model = dlm.load(str(masked_dir))
    result = model.generate("ROMEO:", length=200, steps=4)
    assert len(result.text) == 200
    assert "█" not in result.text
    assert result.forwards <= 4 * (200 // 24 + 1)  # windows of 32 that overlap by 8


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 3}, {"length": 12, "suffix": " it"}])
def test_a_prompt_may_be_tokens(options: dict[str, Any]) -> None:
    model = make_model()
    ids = model.tokenizer.encode("I sing")
    said, meant = model.canvas(["I sing", "No"], **options), model.canvas([ids, "No"], **options)
    assert torch.equal(said.tokens_BT, meant.tokens_BT)
    assert torch.equal(said.free_BT, meant.free_BT)
    for strange in (-1, model.tokenizer.mask_id):
        with pytest.raises(dlm.InputError, match=f"the token {strange} is none of the"):
            model.canvas([[*ids, strange]])


def test_template_keeps_what_is_given() -> None:
    model = make_model()
    text = model.generate(template="ROMEO: ____ love, __ night", steps=4).text
    assert text[:7] == "ROMEO: "
    assert text[11:18] == " love, "
    assert text[20:] == " night"
    with pytest.raises(dlm.InputError, match="stands alone"):
        model.generate("A", template="__")


def test_a_literal_underscore_in_a_template() -> None:
    model = make_model(alphabet="ab_")
    assert model.generate(template=r"a\_b_", steps=2).text.startswith("a_b")


def test_public_names_are_all_there() -> None:
    for name in dlm.__all__:
        assert getattr(dlm, name) is not None
    with pytest.raises(AttributeError):
        dlm.nothing  # noqa: B018
