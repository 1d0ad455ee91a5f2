"""A LLaDA-shaped model of half a billion random parameters: the reference's sampling loop on transformers, and dlm on the same weights.

    python benchmarks/open_models.py                    # 2 CPU threads, every method in a process of its own, some minutes
    python benchmarks/open_models.py --small            # a model of 3 million parameters: does it run?
    python benchmarks/open_models.py --sixth --methods transformers,dlm   # 3 of the 18 layers, a sixth of the vocabulary: where time goes
    python benchmarks/open_models.py --methods transformers,dlm,dual --device cuda --dtype bfloat16

The arithmetic of a forward pass does not depend on what the weights have learned, so a random model is as slow as a trained one.
`transformers` is LLaDA's loop as one writes it down: in every step the logits of all positions, a softmax in float64, the most confident
tokens of the block. The others are dlm with the same blocks and steps; those with exact settings have to write the same ids. `early-end`
takes the first token that stands after the first block, and not in it, for the end-of-text token. peak: resident bytes of the process, or
of the GPU. blocks, head, rest: CPU seconds of a forward pass in all blocks, in the head, and in softmax, choice and loop, on a CPU alone.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import tokenizers
import torch
from huggingface_hub import save_torch_state_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dlm.language_model import load
from dlm.language_model.options import TextKeywords

MASK, PROMPT = 256, 64
LARGE = {"vocabulary": 126_464, "width": 1024, "mlp": 3072, "layers": 18, "heads": 16}
SMALL = {"vocabulary": 8192, "width": 128, "mlp": 384, "layers": 4, "heads": 4}
SIXTH = LARGE | {"vocabulary": 126_464 // 6, "layers": 3}  # the same share of FLOPs in blocks and head
METHODS: dict[str, dict[str, Any]] = {  # load: of dlm.load; the others of `generate`
    "dlm": {},
    "early-end": {"end": True},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "int8": {"load": "int8"},
    "int4": {"load": "int4"},
    "int4 dual": {"load": "int4", "cache": "dual"},
}
EXACT = ("transformers", "dlm", "early-end")
Ids = list[int]


def make(directory: Path, size: dict[str, int]) -> None:
    """A checkpoint in LLaDA's files: config, shards in bfloat16, tokenizer."""
    rng, width = torch.Generator().manual_seed(0), size["width"]

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=rng).mul_(inputs**-0.5).bfloat16()

    state = {"wte.weight": matrix(size["vocabulary"], width), "ln_f.weight": torch.ones(width).bfloat16()}
    for i in range(size["layers"]):
        block = {name: matrix(width, width) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        block |= {"ff_proj": matrix(size["mlp"], width), "up_proj": matrix(size["mlp"], width), "ff_out": matrix(width, size["mlp"])}
        block |= {name: torch.ones(width).bfloat16() for name in ("attn_norm", "ff_norm")}
        state |= {f"blocks.{i}.{name}.weight": tensor for name, tensor in block.items()}
    state["ff_out.weight"] = matrix(size["vocabulary"], width)
    save_torch_state_dict({f"model.transformer.{k}": v for k, v in state.items()}, directory, max_shard_size="256MB")
    words = {f"w{i}": i for i in range(size["vocabulary"]) if i != MASK} | {"<|mdm_mask|>": MASK}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.add_special_tokens(["<|mdm_mask|>"])
    inner.save(str(directory / "tokenizer.json"))
    config = {"architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": width, "n_layers": size["layers"]}
    config |= {"n_heads": size["heads"], "mlp_hidden_size": size["mlp"], "vocab_size": size["vocabulary"]}
    config |= {"embedding_size": size["vocabulary"], "max_sequence_length": 4096, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
    (directory / "config.json").write_text(json.dumps(config | {"mask_token_id": MASK}))


class Clocks:
    """CPU seconds that calls of some modules have taken."""

    def __init__(self, **modules: torch.nn.Module) -> None:
        self.begun = dict.fromkeys(modules, 0.0)
        self.seconds = dict.fromkeys(modules, 0.0)
        for name, module in modules.items():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(partial(self._leave, name))
        self.start = time.process_time()

    def reset(self) -> None:
        self.seconds, self.start = dict.fromkeys(self.seconds, 0.0), time.process_time()

    def _enter(self, name: str, *_how: Any) -> None:
        self.begun[name] = time.process_time()

    def _leave(self, name: str, *_how: Any) -> None:
        self.seconds[name] += time.process_time() - self.begun[name]

    def shares(self, forwards: int) -> dict[str, float]:
        """Of a forward pass, of modules `network` and, within it, `head`."""
        whole, network, head = time.process_time() - self.start, self.seconds["network"], self.seconds["head"]
        found = {"blocks": network - head, "head": head, "rest": whole - network}
        return {name: round(seconds / forwards, 4) for name, seconds in found.items()}


def transformers_network(directory: Path, device: str, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Clocks]:
    """The same weights as a Llama of transformers that reads in both directions: ids (B, T) -> logits (B, T, V)."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    c = json.loads((directory / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["d_model"],
        intermediate_size=c["mlp_hidden_size"],
        num_hidden_layers=c["n_layers"],
        num_attention_heads=c["n_heads"],
        max_position_embeddings=c["max_sequence_length"],
        rms_norm_eps=c["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
        tie_word_embeddings=False,
    )
    names = {"wte": "model.embed_tokens", "ln_f": "model.norm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj"}
    names |= {"v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj", "attn_norm": "input_layernorm"}
    names |= {"ff_norm": "post_attention_layernorm", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj"}
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {}
    for file in sorted(directory.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            parts = key.removeprefix("model.transformer.").split(".")
            last = parts[-2]
            if parts[0] == "blocks":
                name = f"model.layers.{parts[1]}.{'mlp.down_proj' if last == 'ff_out' else names[last]}"
            else:
                name = "lm_head" if last == "ff_out" else names[last]
            state[f"{name}.weight"] = tensor.to(device, dtype)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model = model.eval().requires_grad_(False)

    def logits(z_BT: Tensor) -> Tensor:
        reads_all = torch.zeros(len(z_BT), 1, z_BT.shape[1], z_BT.shape[1], dtype=dtype, device=z_BT.device)
        found: Tensor = model(z_BT, attention_mask=reads_all, use_cache=False).logits
        return found

    return logits, Clocks(network=model, head=model.lm_head)


@torch.no_grad()
def loop(logits: Callable[[Tensor], Tensor], z_BT: Tensor, steps: int, block: int) -> int:
    """Low-confidence remasking of LLaDA at temperature 0, in place; the forward passes."""
    length = z_BT.shape[1] - PROMPT
    passes, each = 0, steps // (length // block)
    for first in range(PROMPT, PROMPT + length, block):
        for step in range(each):
            masked_BT = z_BT == MASK
            logits_BTV = logits(z_BT)
            logits_BTV[..., MASK] = -torch.inf
            token_BT = logits_BTV.argmax(-1)
            p_BTV = torch.softmax(logits_BTV.to(torch.float64), dim=-1)
            sure_BT = p_BTV.gather(-1, token_BT[..., None]).squeeze(-1).masked_fill(~masked_BT, -torch.inf)
            sure_BT[:, first + block :] = -torch.inf
            count = block // each + (step < block % each)
            at_BK = sure_BT.topk(count, -1).indices
            z_BT.scatter_(1, at_BK, token_BT.gather(1, at_BK))
            passes += 1
    return passes


def measured(directory: Path, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One method, in this process: seconds, forward passes, peak memory, ids."""
    torch.set_num_threads(arguments.threads)
    prompt: list[int] = torch.randint(MASK, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    if method == "transformers":
        import_module("transformers.models.llama.modeling_llama")  # what is imported is no part of a model
    idle = peak_bytes(device)
    if method == "transformers":
        network, clocks = transformers_network(directory, device, dtype)
        z_BT = torch.tensor([[*prompt, *[MASK] * arguments.new_tokens]], device=device)
        with torch.no_grad():
            network(z_BT)
        clocks.reset()
        begin = time.perf_counter()
        forwards = loop(network, z_BT, arguments.steps, arguments.block)
        ids = z_BT[0].tolist()
        seconds = time.perf_counter() - begin
    else:
        settings = METHODS[method]
        lm = load(str(directory), device=device, dtype=settings.get("load", dtype))
        lm.defaults["eos_token_id"] = arguments.end if settings.get("end") else []
        options: TextKeywords = {"max_new_tokens": arguments.new_tokens, "temperature": 0.0, "block_length": arguments.block}
        options["cache"] = settings.get("cache", True)
        few: TextKeywords = {**options, "steps": arguments.new_tokens // arguments.block}
        lm.generate([prompt], **few)  # what is made once
        clocks = Clocks(network=lm.network, head=lm.network.head)
        options["steps"] = arguments.steps
        (found,) = lm.generate([prompt], **options)
        seconds, forwards, ids = found.seconds, found.forwards, found.trajectory.current_BT[0].tolist()
    shares = clocks.shares(forwards) if device == "cpu" else {}
    return {"seconds": round(seconds, 2), "forwards": forwards, "peak": peak_bytes(device) - idle, "ids": ids} | shares


def peak_bytes(device: str) -> int:
    """Of the GPU, or resident ones of this process alone."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--sixth", action="store_true")
    parser.add_argument("--methods", default=",".join(["transformers", *METHODS]))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one method in this process, DIRECTORY:METHOD:END
    arguments = parser.parse_args()
    if arguments.run:
        directory, method, end = arguments.run.split(":")
        arguments.end = int(end)
        print(json.dumps(measured(Path(directory), method, arguments)))
        return
    size, rows = SMALL if arguments.small else SIXTH if arguments.sixth else LARGE, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), size)
        end = -1
        for method in arguments.methods.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--run", f"{name}:{method}:{end}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = {"method": method} | json.loads(done.stdout.splitlines()[-1])
            ids: Ids = row.pop("ids")
            if not rows:
                first, second = ids, PROMPT + arguments.block
                end = next((token for token in ids[second:] if token not in ids[PROMPT:second]), -1)
            told = ids if MASK not in ids else ids[: ids.index(MASK)]  # a text that has ended
            row["same"] = sum(a == b for a, b in zip(told[PROMPT:], first[PROMPT:], strict=False)) / len(told[PROMPT:])
            row["speed_up"] = round(rows[0]["seconds"] / row["seconds"], 2) if rows else 1.0
            rows.append(row)
            Console(stderr=True).print(json.dumps(row), highlight=False, soft_wrap=True)
    parts = [part for part in ("blocks", "head", "rest") if part in rows[0]]
    table = Table("method", "forward passes", "seconds", "speed-up", "peak GB", "ids of the first", *parts, box=None)
    for row in rows:
        figures = f"{row['seconds']:.1f}", f"{row['speed_up']:.2f}", f"{row['peak'] / 1e9:.2f}", f"{row['same']:.0%}"
        table.add_row(row["method"], str(row["forwards"]), *figures, *(f"{row[part]:.3f}" for part in parts))
    Console().print(table)
    wrong = [row["method"] for row in rows if row["method"] in EXACT and row["same"] < 1]
    settings = {key: value for key, value in vars(arguments).items() if key != "run"}
    print(json.dumps({"size": size, "settings": settings, "rows": rows, "differ": wrong}))


if __name__ == "__main__":
    main()
