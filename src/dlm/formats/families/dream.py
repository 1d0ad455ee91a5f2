"""Dream-7B, DreamCoder and DiffuCoder (DreamLM/Dream; Ye et al. 2508.15487): Qwen2's keys and names, logits shifted by one.

DreamReasoner has the same model_type and another architecture, DreamForCausalLM: it is another family.
"""

from __future__ import annotations

from dlm.formats.families.a2d import bidirectional
from dlm.formats.families.record import Config, Family
from dlm.formats.huggingface import NAMES
from dlm.formats.keys import require
from dlm.models.config import TransformerConfig


def shape(config: Config) -> TransformerConfig:
    require(config, {"use_mrope": (False, None), "use_sliding_window": (False, None)})
    return bidirectional(config, "qwen2")


DREAM = Family(
    name="dream",
    architectures=("DreamModel",),
    names=NAMES,
    shape=shape,
    mask_texts=("<|mask|>",),
    shift=True,
    stop_texts=("<|im_end|>",),
    preset={"sampler": "dream", "steps": 256, "temperature": 0.2, "top_p": 0.95},
)
