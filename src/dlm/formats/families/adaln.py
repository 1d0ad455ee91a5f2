"""Names and keys that the checkpoints of the adaLN network share: MDLM, BD3-LM, DUO, SEDD and GIDD differ in prefix and config alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dlm.formats.families.record import Config
from dlm.formats.keys import require
from dlm.formats.names import Names
from dlm.formats.stored import Stored
from dlm.models.adaln import AdaLNConfig

LOG_LINEAR = "log-linear:0.001"  # the schedule of MDLM, BD3-LM, SEDD and DUO
GPT2 = "openai-community/gpt2"  # whose tokenizer they were trained with and do not ship

OWN = Names(
    outside={
        "vocab_embed": "embed",
        "sigma_map.mlp.0": "level.inner",
        "sigma_map.mlp.2": "level.outer",
        "output_layer.norm_final": "out_norm",
        "output_layer.adaLN_modulation": "out_modulation",
        "output_layer.linear": "head",
    },
    layers="blocks.",
    inside={
        "norm1": "attention_norm",
        "attn_q": "attention.q",
        "attn_k": "attention.k",
        "attn_v": "attention.v",
        "attn_out": "attention.out",
        "norm2": "mlp_norm",
        "mlp.0": "mlp.up",
        "mlp.2": "mlp.down",
        "adaLN_modulation": "modulation",
    },
    ignored=("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "sampling_eps_min", "sampling_eps_max"),
)


@dataclass(frozen=True)
class AdaLNNames:
    """`Names` after the prefix is taken off and the rows of `attn_qkv`, those of all heads' q, then k, then v, are parted."""

    prefix: str = ""

    def renamed(self, state: dict[str, Stored], where: Path, kinds: str) -> dict[str, Stored]:
        """As of `Names.renamed`."""
        plain: dict[str, Stored] = {}
        for name in list(state):
            tensor, name = state.pop(name), name.removeprefix(self.prefix)
            if name.endswith("attn_qkv.weight"):
                plain |= {name.replace("attn_qkv", f"attn_{part}"): _third(tensor, n) for n, part in enumerate("qkv")}
            else:
                plain[name.replace("vocab_embed.embedding", "vocab_embed.weight")] = tensor
        return OWN.renamed(plain, where, kinds)


def _third(fused: Stored, number: int) -> Stored:
    rows, *rest = fused.shape
    size = rows // 3

    def read() -> Tensor:
        return fused.read()[number * size : (number + 1) * size].clone()

    return Stored((size, *rest), read)


def shape(config: Config, **more: Any) -> AdaLNConfig:
    """The network of a config with the keys of MDLM, BD3-LM and DUO."""
    require(config, {"causal": (False, None)})
    return AdaLNConfig(
        **{
            "vocab_size": config["vocab_size"],
            "window": config["model_length"],
            "layers": config["n_blocks"],
            "heads": config["n_heads"],
            "width": config["hidden_dim"],
            "level_width": config["cond_dim"],
        }
        | more
    )
