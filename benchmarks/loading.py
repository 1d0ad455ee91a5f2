"""Memory and time of loading a large diffusion checkpoint in each dtype: at most its weights in memory and one shard of the files.

Makes a random LLaDA-shaped checkpoint in bfloat16, in shards as on the hub, loads it in a process of its own for each dtype, and prints one
JSON object. bytes of weights: of the loaded network; peak: resident bytes above those before loading, the mapped file among them.

    python benchmarks/loading.py --gigabytes 1 --dtypes float32,bfloat16,int8,int4
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from dlm.text.tokenizer import Tokenizer

VOCABULARY, WIDTH, MLP_WIDTH = 126_464, 1024, 3072
SHARD_MB = 256
LOAD = """
import json, sys, time
import torch
import dlm
from dlm.inference.preparation import held_bytes
from dlm.language_model import load
torch.set_num_threads(2)
def status(key):  # of this process alone, which getrusage's peak is not: it begins with that of the process before it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
load("shakespeare-mask")  # what is imported late
resident = status("VmRSS")
begin = time.perf_counter()
lm = load(sys.argv[1], dtype=sys.argv[2])
seconds = time.perf_counter() - begin
peak = status("VmHWM") - resident
print(json.dumps({"dtype": sys.argv[2], "seconds": round(seconds, 1), "weights": held_bytes(lm.network), "peak": peak}))
"""


def make(directory: Path, gigabytes: float) -> int:
    """A checkpoint of about this size; the bytes of its largest shard."""
    layer = 4 * WIDTH * WIDTH + 3 * WIDTH * MLP_WIDTH
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * WIDTH) / layer))
    rng = torch.Generator().manual_seed(0)

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=rng).mul_(0.02).bfloat16()

    state = {"wte.weight": matrix(VOCABULARY, WIDTH), "ln_f.weight": torch.ones(WIDTH).bfloat16()}
    for i in range(layers):
        block = {name: matrix(WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        block |= {"ff_proj": matrix(MLP_WIDTH, WIDTH), "up_proj": matrix(MLP_WIDTH, WIDTH), "ff_out": matrix(WIDTH, MLP_WIDTH)}
        block |= {name: torch.ones(WIDTH).bfloat16() for name in ("attn_norm", "ff_norm")}
        state |= {f"blocks.{i}.{name}.weight": tensor for name, tensor in block.items()}
    state["ff_out.weight"] = matrix(VOCABULARY, WIDTH)
    save_torch_state_dict({f"model.transformer.{k}": v for k, v in state.items()}, directory, max_shard_size=f"{SHARD_MB}MB")
    inner = Tokenizer.bytes().inner
    inner.add_special_tokens(["<|mdm_mask|>"])
    inner.save(str(directory / "tokenizer.json"))
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": WIDTH,
        "n_layers": layers,
        "n_heads": 16,
        "mlp_hidden_size": MLP_WIDTH,
        "vocab_size": VOCABULARY,
        "embedding_size": VOCABULARY,
        "max_sequence_length": 4096,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "mask_token_id": 256,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return max(file.stat().st_size for file in directory.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dtypes", default="float32,bfloat16,int8,int4")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shard = make(Path(name), arguments.gigabytes)
        rows = []
        for dtype in arguments.dtypes.split(","):
            done = subprocess.run([sys.executable, "-c", LOAD, name, dtype], check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout) | {"within": None})
            rows[-1]["within"] = rows[-1]["peak"] <= rows[-1]["weights"] + shard
        files = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    print(json.dumps({"files": files, "shard": shard, "loads": rows}))


if __name__ == "__main__":
    main()
