"""tiny-diffusion (nathan-barry/tiny-diffusion): a .pt file of characters by ASCII code, 0 the mask, with a vector for each noise level.

Norms have no gains. Its rotation turns the other way: that is ours once the halves of each head of queries and keys are swapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.files import read_json
from dlm.formats.families.record import Config, Family
from dlm.formats.names import Names
from dlm.formats.stored import Stored
from dlm.models.config import TransformerConfig

KEYS = ("n_embd", "n_head", "n_layer", "diffusion_steps")
RELEASED = {"n_embd": 384, "n_head": 6, "sequence_len": 256, "context_len": 16}  # of the file in its repository, which has no config
OWN = Names(
    outside={"token_emb": "embed", "time_emb": "time", "output_head": "head"},
    layers="blocks.",
    inside={
        "attn.c_q": "attention.q",
        "attn.c_k": "attention.k",
        "attn.c_v": "attention.v",
        "attn.c_proj": "attention.out",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    },
)


def describe(path: Path, state: dict[str, Stored]) -> Config:
    """The config.json of a directory or beside a file, else that of the released file. InputError for a file of another size alone."""
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file() and TINY_DIFFUSION.recognises(data := read_json(beside)):
        return dict(data)
    try:
        (vocabulary, width), (steps, _) = state["token_emb.weight"].shape, state["time_emb.weight"].shape
        layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    except (KeyError, ValueError, IndexError):
        raise InputError(f"{path} is no checkpoint of tiny-diffusion, the only .pt file that dlm reads") from None
    if width != RELEASED["n_embd"]:
        raise InputError(f"{path}: how many heads share its width of {width} stands nowhere: put a config.json with n_head beside it")
    return {**RELEASED, "vocab_size": vocabulary, "n_layer": layers, "diffusion_steps": steps, "mask_token_id": 0}


def shape(config: Config) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=config["vocab_size"],
        window=config["sequence_len"],
        layers=config["n_layer"],
        heads=config["n_head"],
        width=config["n_embd"],
        norm_eps=torch.finfo(torch.float32).eps,
        time_conditioning=True,
        time_steps=config["diffusion_steps"],
        embed_norm=True,
    )


@dataclass(frozen=True)
class Swapped:
    """`Names`, with the halves of each head of queries and keys swapped, and gains of 1."""

    def renamed(self, state: dict[str, Stored], where: Path, kinds: str) -> dict[str, Stored]:
        """As of `Names.renamed`."""
        config = describe(where, state)
        width, heads = config["n_embd"], config["n_head"]
        found = OWN.renamed(state, where, kinds)
        for name in list(found):
            if name.endswith(("attention.q.weight", "attention.k.weight")):
                found[name] = _swapped(found[name], heads)
        gains = {"norm": width}
        for layer in range(config["n_layer"]):
            inside = {"attention_norm": width, "mlp_norm": width, "attention.q_norm": width // heads, "attention.k_norm": width // heads}
            gains |= {f"blocks.{layer}.{name}": size for name, size in inside.items()}
        return found | {f"{name}.weight": _ones(size) for name, size in gains.items()}


def _swapped(stored: Stored, heads: int) -> Stored:
    def read() -> Tensor:
        rows = stored.read()
        return rows.view(heads, 2, -1, rows.shape[-1]).flip(1).reshape(rows.shape)

    return Stored(stored.shape, read)


def _ones(size: int) -> Stored:
    def read() -> Tensor:
        return torch.ones(size)

    return Stored((size,), read)


TINY_DIFFUSION = Family(
    name="tiny-diffusion",
    architectures=(),
    keys=KEYS,
    names=Swapped(),
    shape=shape,
    describe=describe,
    tokenizer="ascii",
    harmless=("context_len", "format"),
    preset={"sampler": "tiny-confidence:0.9", "steps": 256, "temperature": 0.0},
)
