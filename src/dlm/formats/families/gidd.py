"""GIDD (dvruette/gidd; von Ruette et al. 2503.04482): masks and uniform replacements at once, a network that is told t itself."""

from __future__ import annotations

from dlm.formats.families import adaln
from dlm.formats.families.record import Config, Family
from dlm.formats.keys import require
from dlm.models.adaln import AdaLNConfig


def shape(config: Config) -> AdaLNConfig:
    require(config, {"gamma": (1.0, None)})
    return AdaLNConfig(
        vocab_size=config["vocab_size"],
        window=config["max_seq_len"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        width=config["hidden_size"],
        level_width=config["timestep_cond_dim"],
        level="time",
    )


GIDD = Family(
    name="gidd",
    architectures=("DIT",),
    keys=("p_uniform", "timestep_cond_dim"),
    names=adaln.AdaLNNames(),
    shape=shape,
    noise={"process": "gidd", "schedule": "linear"},
    noise_keys=("p_uniform",),
    packed=True,
    harmless=("t_eps",),
    mask_texts=("[MASK]",),
    tokenizer=adaln.GPT2,
    preset={"sampler": "ancestral", "steps": 128, "temperature": 1.0},
)
