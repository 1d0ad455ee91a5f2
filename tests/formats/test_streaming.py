"""A checkpoint that is quantized while it is read never lies in memory as a whole, and gives the network that quantizing it later gives."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import make_model
from dlm.formats import gguf_export, native
from dlm.formats.families import llada
from dlm.formats.stored import Stored
from dlm.inference import prepare
from dlm.inference.quantize import BITS
from dlm.language_model import load
from dlm.models.transformer import Transformer

GOLDEN = Path(__file__).parents[1] / "golden"
WIDTH, MLP_WIDTH, LAYERS = 512, 2048, 16
OF_A_BLOCK = 7  # matrices
LOAD = """
import sys
from dlm.inference.preparation import held_bytes
from dlm.language_model import load
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
load(sys.argv[1], dtype=sys.argv[3])
before = status("VmRSS")
lm = load(sys.argv[2], dtype=sys.argv[3])
print(status("VmHWM") - before, held_bytes(lm.network))
"""


def wide(directory: Path) -> int:
    """A LLaDA of random weights, 256 MB in float32, in small shards; its bytes."""
    config = json.loads((GOLDEN / "llada" / "config.json").read_text())
    config |= {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": MLP_WIDTH}
    network = Transformer(llada.shape(config))
    state = {llada.NAMES.theirs(name): tensor for name, tensor in network.state_dict().items()}
    files = {name: (GOLDEN / "llada" / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    native.write(directory, state, config, files=files)
    return sum(tensor.nbytes for tensor in state.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_memory_is_that_of_the_weights_one_shard_and_four_of_sixteen_blocks(dtype: str, tmp_path: Path) -> None:
    size = wide(tmp_path)
    shard = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    command = [sys.executable, "-c", LOAD, str(GOLDEN / "llada"), str(tmp_path), dtype]
    block = size // LAYERS
    for _ in range(3):  # the system maps more of a file at times, never less
        peak, held = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        if peak < held + shard + 4 * block:  # quantizing a block takes so much besides
            break
    else:
        pytest.fail(f"the peak was {peak} bytes, {held} of them held, three times")
    assert held + shard + 4 * block < 0.6 * size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_gguf_file_of_four_bits_is_unpacked_block_by_block(tmp_path: Path) -> None:
    size = wide(tmp_path)
    whole, file = load(str(tmp_path)), tmp_path / "wide.gguf"
    gguf_export.write(whole.network, whole.config, whole.tokenizer, file, stops=whole.stops, chat=whole.chat, dtype="q4_0")
    command = [sys.executable, "-c", LOAD, str(GOLDEN / "llada"), str(file), "int4"]
    peak, held = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    print(f"{size / 1e6:.0f} MB in float32, file {file.stat().st_size / 1e6:.0f} MB, held {held / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert peak < held + file.stat().st_size + 6 * size // LAYERS < 0.8 * size  # numpy unpacks with copies


@pytest.mark.parametrize("name", ["llada", "dream", "a2d_qwen3"])
@pytest.mark.parametrize("dtype", BITS)
def test_the_network_is_the_one_quantized_later(name: str, dtype: str) -> None:
    z_BT = load_file(GOLDEN / name / "golden.safetensors")["input_ids"]
    later = load(str(GOLDEN / name))
    prepare(later.network, bits=BITS[dtype])
    assert torch.equal(load(str(GOLDEN / name), dtype=dtype).logits(z_BT), later.logits(z_BT))


@pytest.mark.parametrize("dtype", BITS)
def test_a_network_with_short_convolutions_is_the_one_quantized_later(dtype: str, tmp_path: Path) -> None:
    later = make_model(conv=5)
    later.save_pretrained(tmp_path)
    prepare(later.network, bits=BITS[dtype])
    z_BT, read = torch.arange(24)[None] % 20, load(str(tmp_path), dtype=dtype)
    assert read.network.quantized
    assert torch.equal(read.logits(z_BT), later.logits(z_BT))


def test_matrices_of_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []
    most = 0
    stored = native.weights

    def watched(path: Path, *, copied: bool) -> dict[str, Stored]:
        def watch(one: Stored) -> Stored:
            def read() -> Tensor:
                nonlocal most
                tensor = one.read()
                held.append(weakref.ref(tensor))
                most = max(most, sum(ref() is not None for ref in held))
                return tensor

            return Stored(one.shape, read)

        return {name: watch(one) for name, one in stored(path, copied=copied).items()}

    monkeypatch.setattr(native, "weights", watched)
    lm = load(str(GOLDEN / "llada"), dtype="int4")
    assert len(held) == 3 + lm.config.network.layers * (OF_A_BLOCK + 2)
    assert most <= OF_A_BLOCK
