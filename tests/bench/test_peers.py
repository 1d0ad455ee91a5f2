"""Other engines beside our own: the same weights, the same prompts, the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from bases import SPECIAL, WORDS, publish, tokenizer, transformer
from conftest import Dlm
from dlm.bench import peers
from dlm.bench.prompts import KINDS
from dlm.formats import huggingface
from dlm.language_model import load
from dlm.text.tokenizer import Tokenizer
from formats.test_gguf import write


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a vocabulary that knows the prompts."""
    words = "".join(text for texts in KINDS.values() for text in texts) + WORDS + "ROMEO"
    inner = Tokenizer.bpe(words, 150).inner
    inner.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    spare = inner.get_vocab_size() - tokenizer().get_vocab_size()
    path = publish(transformer("Llama", spare=spare, max_position_embeddings=2048), tmp_path_factory.mktemp("llama"))
    inner.save(str(path / "tokenizer.json"))
    return path


def test_transformers_writes_our_text(llama_dir: Path, tmp_path: Path) -> None:
    lm = load(str(llama_dir))
    huggingface.to_hugging_face(lm.network, lm.config, tmp_path, files=lm.files())
    ours = [lm.generate(text, temperature=0.0, max_new_tokens=12) for text in ("ROMEO", "What light")]
    prompts = [lm.tokenizer.encode(text) for text in ("ROMEO", "What light")]
    peer = peers.Transformers(tmp_path, [], None, device="cpu", dtype=torch.float32)
    written, first = peer.write(prompts[:1], 12)
    expected = [one.trajectory.current_BT[0].tolist()[len(ids) :] for one, ids in zip(ours, prompts, strict=True)]
    assert written == expected[:1]
    assert first > 0
    assert peer.write(prompts, 12)[0] == expected
    stop = expected[0][4]
    ended = peers.Transformers(tmp_path, [stop], None, device="cpu", dtype=torch.float32).write(prompts[:1], 12)[0]
    assert ended == [expected[0][: expected[0].index(stop) + 1]]
    assert peer.weights() >= 4 * (lm.network.parameters_count() - 2 * 32)  # without the mask's rows


def test_llama_cpp_writes_our_text(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    file = write(transformer("Llama"), tmp_path / "tiny.gguf")
    lm = load(str(file))
    ids = lm.tokenizer.encode("ROMEO what")
    run = lm.generate("ROMEO what", temperature=0.0, max_new_tokens=12)
    expected = run.trajectory.current_BT[0].tolist()[len(ids) :]
    peer = peers.LlamaCpp(file, sorted(lm.stops), lm.config.start_token_id, positions=64, threads=1)
    written, first = peer.write([peer.start + ids], 12)
    assert written == [expected]
    assert first > 0
    assert peer.weights() == file.stat().st_size
    stop = expected[4]
    assert peers.LlamaCpp(file, [stop], None, positions=64, threads=1).write([ids], 12)[0] == [expected[: expected.index(stop) + 1]]


def test_the_verb_with_kinds_dtypes_and_peers(dlm: Dlm, llama_dir: Path) -> None:
    base = ("bench", "decode", str(llama_dir), "--max-new-tokens", "6", "--rounds", "1", "--temperature", "0", "--threads", "1")
    options = ("--kind", "question,code", "--batch", "1,4", "--methods", "lookup:3", "--dtype", "float32,int8", "--peers", "transformers")
    code, out, err = dlm(*base, *options, "--json")
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1])
    rows = facts["rows"]
    assert facts["threads"] == 1
    assert facts["peers"] == "transformers"
    names = ["autoregressive", "lookup:3", "autoregressive int8", "lookup:3 int8", "transformers"]
    assert [row["method"] for row in rows] == names * 4
    assert [row["kind"] for row in rows] == ["question"] * 10 + ["code"] * 10
    assert all(row["same"] for row in rows)
    assert all(row["tokens"] == 6 * len(KINDS[row["kind"]]) for row in rows)
    by = {(row["method"], row["batch"]): row for row in rows}
    assert by["autoregressive", 1]["memory"] < by["autoregressive", 4]["memory"]
    assert by["autoregressive int8", 1]["memory"] < by["autoregressive", 1]["memory"]
    assert by["transformers", 1]["calls"] == 0
    assert by["transformers", 1]["tokens_per_forward"] is None
    assert "unknown kind of prompt 'song'" in dlm.told(*base, "--kind", "song")
    assert "unknown peer 'vllm'" in dlm.told(*base, "--kind", "code", "--peers", "vllm")
    assert "with --temperature 0" in dlm.told(*base[:7], "--kind", "code", "--peers", "transformers")
    assert "llama.cpp reads GGUF files" in dlm.told(*base, "--kind", "code", "--peers", "llama.cpp")
    assert "give one" in dlm.told(*base, "--kind", "code", "--prompts", "x.txt")
