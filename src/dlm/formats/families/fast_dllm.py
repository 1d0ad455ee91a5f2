"""Fast-dLLM v2 1.5B and 7B (NVlabs/Fast-dLLM; Wu et al. 2509.26328): Qwen2.5 read block by block from position 0, logits shifted by one.

The first token of a block is that after the last of the block before; sub-blocks are filled from left to right.
"""

from __future__ import annotations

from dlm.formats.families.a2d import bidirectional
from dlm.formats.families.record import Config, Family
from dlm.formats.huggingface import NAMES
from dlm.models.config import TransformerConfig


def shape(config: Config) -> TransformerConfig:
    return bidirectional(config, "qwen2").with_(attention="block_causal", block_length=config["bd_size"])


FAST_DLLM = Family(
    name="fast-dllm-v2",
    architectures=("Fast_dLLM_QwenForCausalLM",),
    keys=("bd_size",),
    names=NAMES,
    shape=shape,
    mask_texts=("|<MASK>|", "<|mask|>"),
    mask_id=151_665,
    shift=True,
    phase="zero",
    stop_texts=("<|im_end|>",),
    preset={"sampler": "fast-dllm:0.9", "steps": 256, "temperature": 0.0},
)
