"""Standard input and output as shells give them: bytes that are no UTF-8, terminals without it, readers that leave, prompts by a pipe."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bases import publish, transformer
from conftest import Dlm, make_model
from dlm import cli
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer

BROKEN = os.fsdecode(b"hi \xff\xfe")  # as the shell hands it over


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template."""
    return publish(transformer("Llama"), tmp_path_factory.mktemp("streams") / "base")


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "bytes"
    make_model(tokenizer=Tokenizer.bytes()).save_pretrained(path)
    return path


def test_d19_bytes_that_are_no_utf8_get_one_line(dlm: Dlm, of_bytes: Path, base: Path) -> None:
    for words in (
        ["generate", BROKEN, str(of_bytes)],
        ["generate", "a", str(of_bytes), "--suffix", BROKEN],
        ["generate", "--template", f"a_{BROKEN}", "--model", str(of_bytes)],
        ["chat", str(base), "--system", BROKEN],
    ):
        assert "not valid UTF-8" in dlm.told(*words), words


def test_d19_a_conversation_goes_on_with_the_next_line(dlm: Dlm, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = []
    for lines in (b"But soft\n", b"hi \xff there\nBut soft\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        code, out, err = dlm("chat", str(base), "--max-new-tokens", "4")
        assert code == 0
        assert ("not valid UTF-8" in err) == (b"\xff" in lines)
        spoken.append(out)
    assert spoken[0] == spoken[1]


def test_d19_standard_input_of_other_bytes(dlm: Dlm, of_bytes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a \xff\n"), encoding="utf-8"))
    assert "not valid UTF-8" in dlm.told("generate", "-", str(of_bytes))


def test_a_prompt_from_standard_input(dlm: Dlm, of_bytes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = ["--model", str(of_bytes), "--max-new-tokens", "4", "--steps", "2", "--json"]
    for given, prompt in (("日本\n", "日本"), ("a\nb\n\n", "a\nb\n"), ("", "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode()), encoding="utf-8"))
        code, out, _ = dlm("generate", "-", *how)
        assert code == 0
        assert json.loads(out)["text"].startswith(prompt)
        assert dlm("generate", prompt, *how)[1].split('"seconds"')[0] == out.split('"seconds"')[0]


def test_an_answer_that_ends_in_half_a_character_is_shown_to_its_end(dlm: Dlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_model("autoregressive", tokenizer=Tokenizer.bytes())
    lm.chat = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}:")
    lm.save_pretrained(tmp_path / "bytes")
    halves = 0
    for tokens in range(1, 8):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("日本\n".encode()), encoding="utf-8"))
        code, out, _ = dlm("chat", str(tmp_path / "bytes"), "--max-new-tokens", str(tokens), "--temperature", "1", "--seed", "3")
        canvas = lm.chat_canvas([{"role": "user", "content": "日本"}], max_new_tokens=tokens)
        *_, frame = lm.stream(canvas=canvas, temperature=1.0, seed=3)
        text = lm.tokenizer.decode(frame.tokens_BT[0, canvas.given_BT[0].sum() :].tolist())
        assert (code, out) == (0, text + "\n")
        halves += text.endswith("\ufffd")
    assert halves


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_d20_a_terminal_of_another_encoding_shows_escapes(
    encoding: str, of_bytes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also of a saved run, and in a conversation's answer."""
    monkeypatch.chdir(tmp_path)
    written = []
    for words in (["generate", "é日", str(of_bytes), "--max-new-tokens", "2", "--save", "run.traj"], ["show", "run.traj"]):
        screen = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding=encoding))
        monkeypatch.setattr(sys, "argv", ["dlm", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        written.append(screen.getvalue().decode(encoding))
        assert written[-1].startswith(("\\xe9" if encoding == "ascii" else "é") + "\\u65e5")
    assert written[0] == written[1]


def piped(stdout: int, *options: str) -> subprocess.CompletedProcess[bytes]:
    """The command line itself, with this standard output."""
    script = "import sys; from dlm.cli import main; sys.argv = ['dlm', 'samplers']; main()"
    words = [sys.executable, *options, "-c", script]
    return subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, timeout=120, check=False)


@pytest.mark.parametrize("options", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_d20_a_reader_that_leaves(options: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = piped(writing, *options)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == b""


IMPORTING = """
import os, signal, sys
MODULE = sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
class Pressed:  # Ctrl-C while this module is looked for
    def find_spec(self, name, *_):
        if name == MODULE:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressed())
from dlm.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["dlm.cli", "dlm.language_model"], ids=["before the command line", "in a command"])
def test_ctrl_c_leaves_no_traceback(module: str) -> None:
    words = [sys.executable, "-c", IMPORTING, module, "generate", "ROMEO:", "--length", "8"]
    done = subprocess.run(words, capture_output=True, timeout=120, check=False)
    assert done.returncode in (-2, 130)  # killed by the signal, which a shell reports as 130
    assert done.stdout == b""
    assert done.stderr in (b"", b"dlm: stopped\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is missing")
def test_a_full_disk_behind_standard_output_is_told() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    done = piped(full)
    os.close(full)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("dlm: No space left on device")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_stream_that_the_shell_closed_is_an_empty_one(closed: str, of_bytes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a"), encoding="utf-8"))
    monkeypatch.setattr(sys, closed, None)
    monkeypatch.setattr(sys, "argv", ["dlm", "generate", "-", str(of_bytes), "--max-new-tokens", "2", "--steps", "1"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    getattr(sys, closed).close()
