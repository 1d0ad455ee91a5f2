"""MDLM (kuleshov-group/mdlm; Sahoo et al. 2406.07524): masked noise, a network that is told sigma = 0 unless `time_conditioning`."""

from __future__ import annotations

from dlm.formats.families import adaln
from dlm.formats.families.record import Config, Family
from dlm.models.adaln import AdaLNConfig


def shape(config: Config) -> AdaLNConfig:
    return adaln.shape(config, level="sigma" if config.get("time_conditioning") else "none")


MDLM = Family(
    name="mdlm",
    architectures=("MDLM",),
    keys=("n_blocks", "cond_dim"),
    names=adaln.AdaLNNames("backbone."),
    shape=shape,
    noise={"process": "masked", "schedule": adaln.LOG_LINEAR},
    packed=True,
    harmless=("var_min",),
    tokenizer=adaln.GPT2,
    preset={"sampler": "ancestral", "steps": 1000, "temperature": 1.0},
)
