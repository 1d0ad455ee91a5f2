"""SDAR (JetAstra/SDAR; JetLM's checkpoints): Qwen3's keys and names, read block by block from position 0.

I-DLM has the same class and names and is read causally, each mask for the token after its own: nothing in its config says so.
"""

from __future__ import annotations

from dlm.formats.families.a2d import bidirectional
from dlm.formats.families.record import Config, Family
from dlm.formats.huggingface import NAMES
from dlm.models.config import TransformerConfig

HARMLESS = ("debug", "ep_size", "micro_forward", "skip_checkpoint", "use_deepep")  # of its training


def shape(config: Config) -> TransformerConfig:
    return bidirectional(config, "qwen3").with_(attention="block_causal", block_length=config["block_size"])


SDAR = Family(
    name="sdar",
    architectures=("SDARForCausalLM",),
    keys=("block_size",),
    names=NAMES,
    shape=shape,
    mask_texts=("<|MASK|>", "<MASK>"),
    phase="zero",
    stop_texts=("<|im_end|>",),
    harmless=HARMLESS,
    preset={"sampler": "confidence:0.85", "steps": 256, "temperature": 1.0},
)
