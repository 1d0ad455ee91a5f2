"""DiffuLLaMA-7B (HKUNLP/DiffuLLaMA; Gong et al. 2410.17891): LLaMA 2 read fully, logits shifted by one, an ordinary token as the mask.

Its config is that of a plain llama: `--family diffullama` says what it is. Its sampler reveals each mask at random on a linear schedule.
"""

from __future__ import annotations

from dlm.formats.families.a2d import bidirectional
from dlm.formats.families.record import Family
from dlm.formats.huggingface import NAMES

DIFFULLAMA = Family(
    name="diffullama",
    architectures=(),
    names=NAMES,
    shape=lambda config: bidirectional(config, "llama"),
    mask_texts=(),
    mask_id=811,
    base="llama",
    shift=True,
    preset={"sampler": "ancestral", "steps": 64, "temperature": 0.9, "top_p": 0.9},
)
