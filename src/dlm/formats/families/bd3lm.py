"""BD3-LM (kuleshov-group/bd3lms; Arriola et al. 2503.09573): MDLM's network read block by block from position 0."""

from __future__ import annotations

from dlm.formats.families import adaln
from dlm.formats.families.record import Config, Family
from dlm.formats.keys import require
from dlm.models.adaln import AdaLNConfig


def shape(config: Config) -> AdaLNConfig:
    require(config, {"adaln": (True,), "cross_attn": (True,), "time_conditioning": (False, None)})
    return adaln.shape(config, attention="block_causal", block_length=config["block_size"])


BD3LM = Family(
    name="bd3lm",
    architectures=("BD3LM",),
    keys=("n_blocks", "block_size"),
    names=adaln.AdaLNNames("backbone."),
    shape=shape,
    noise={"process": "masked", "schedule": adaln.LOG_LINEAR},
    phase="zero",
    packed=True,
    harmless=("attn_backend", "sampling_eps_max", "sampling_eps_min", "var_min"),
    tokenizer=adaln.GPT2,
    preset={"sampler": "first-hitting", "temperature": 1.0},
)
