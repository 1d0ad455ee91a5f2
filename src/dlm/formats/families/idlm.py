"""I-DLM-8B and 32B (arXiv 2604.11035): SDAR's class and names, read causally, each mask for the token after its own.

Nothing in its config tells it from SDAR: `--family i-dlm` does. It is an autoregressive model whose masks draft, so that its official
sampler, introspective strided decoding, is `strided`.
"""

from __future__ import annotations

from dlm.formats.families import sdar
from dlm.formats.families.a2d import bidirectional
from dlm.formats.families.record import Family
from dlm.formats.huggingface import NAMES

IDLM = Family(
    name="i-dlm",
    architectures=(),
    names=NAMES,
    shape=lambda config: bidirectional(config, "qwen3").with_(attention="causal"),
    mask_texts=("<|MASK|>", "<MASK>"),
    base="qwen3",
    causal=True,
    stop_texts=("<|im_end|>",),
    harmless=("block_size", *sdar.HARMLESS),
    preset={"sampler": "strided:4"},
)
