"""DUO (s-sahoo/duo; Sahoo et al. 2506.10892): uniform noise over every id, a network that is told sigma.

It has no mask; it gets one as the id after its own, which no noise and no text holds.
"""

from __future__ import annotations

from dlm.formats.families import adaln
from dlm.formats.families.record import Config, Family
from dlm.models.adaln import AdaLNConfig


def shape(config: Config) -> AdaLNConfig:
    return adaln.shape(config, vocab_size=config["vocab_size"] + 1, level="sigma")


DUO = Family(
    name="duo",
    architectures=("DUO",),
    keys=("n_blocks", "cond_dim"),
    names=adaln.AdaLNNames("backbone."),
    shape=shape,
    noise={"process": "uniform", "schedule": adaln.LOG_LINEAR},
    packed=True,
    harmless=("var_min",),
    appends_mask=True,
    tokenizer=adaln.GPT2,
    preset={"sampler": "ancestral", "steps": 128, "temperature": 1.0},
)
