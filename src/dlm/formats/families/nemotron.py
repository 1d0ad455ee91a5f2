"""Nemotron-Labs-Diffusion 3B, 8B and 14B (nvidia): Mistral's keys, YaRN, the text read causally and the block that is written fully.

The causal reading is an autoregressive model: it gives the first token of a block, unmasked logits give the others.
"""

from __future__ import annotations

from dlm.errors import InputError
from dlm.formats import huggingface
from dlm.formats.families.a2d import bidirectional
from dlm.formats.families.record import Config, Family
from dlm.formats.keys import require
from dlm.formats.names import Names
from dlm.models.config import TransformerConfig

NAMES = Names(
    outside={"encoder.embed_tokens": "embed", "encoder.norm": "norm", "diffusion_head": "head"},
    layers="encoder.layers.",
    inside=huggingface.NAMES.inside,
)


def shape(config: Config) -> TransformerConfig:
    require(config, {"dlm_paradigm": ("bidirectional", "block_diff"), "sliding_window": (None,)})
    rope = config.get("rope_parameters") or {}
    if rope.get("llama_4_scaling_beta") and config["max_position_embeddings"] > rope["original_max_position_embeddings"]:
        raise InputError("max_position_embeddings beyond the original window, where queries are scaled by position, is not supported")
    return bidirectional(config, "llama").with_(attention="causal_text", block_length=config["block_size"])


NEMOTRON = Family(
    name="nemotron-labs-diffusion",
    architectures=("NemotronLabsDiffusionModel",),
    keys=("block_size",),
    names=NAMES,
    shape=shape,
    mask_texts=("<SPECIAL_100>", "<mask>"),
    mask_id=100,
    harmless=("ar_loss_weight", "dlm_loss_weight", "dp_varying_mask_ratio"),
    preset={"sampler": "nemotron:0.9", "steps": 256, "temperature": 0.0},
)
