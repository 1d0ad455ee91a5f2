"""Open-dCoder-0.5B (pengzhangzhi/Open-dLLM): Qwen2.5-Coder read fully, logits shifted by one.

Its config is that of a plain qwen2: `--family open-dcoder` says what it is.
"""

from __future__ import annotations

from dlm.formats.families.a2d import bidirectional
from dlm.formats.families.record import Family
from dlm.formats.huggingface import NAMES

OPEN_DCODER = Family(
    name="open-dcoder",
    architectures=(),
    names=NAMES,
    shape=lambda config: bidirectional(config, "qwen2"),
    mask_texts=("<|mask|>", "[MASK]", "<M>"),
    mask_id=151_665,
    base="qwen2",
    shift=True,
    stop_texts=("<|im_end|>",),
    preset={"sampler": "p2", "steps": 128, "temperature": 0.5, "top_k": 200},
)
