"""SEDD (louaaron/Score-Entropy-Discrete-Diffusion; Lou et al. 2310.16834), absorbing: a network of log scores that is told sigma.

Its config is nested and names no architecture; `tokens` leaves the absorbing state out.
"""

from __future__ import annotations

from dlm.formats.families import adaln
from dlm.formats.families.record import Config, Family
from dlm.formats.keys import require
from dlm.models.adaln import AdaLNConfig


def shape(config: Config) -> AdaLNConfig:
    model = config["model"]
    require(config["graph"], {"type": ("absorb",)})
    require(config["noise"], {"type": ("loglinear",)})
    require(model, {"scale_by_sigma": (True,), "type": ("ddit",)})
    return AdaLNConfig(
        vocab_size=config["tokens"] + 1,
        window=model["length"],
        layers=model["n_blocks"],
        heads=model["n_heads"],
        width=model["hidden_size"],
        level_width=model["cond_dim"],
        level="sigma",
        scores=True,
    )


SEDD = Family(
    name="sedd",
    architectures=(),
    keys=("graph", "noise", "model", "tokens"),
    names=adaln.AdaLNNames(),
    shape=shape,
    noise={"process": "score", "schedule": adaln.LOG_LINEAR},
    packed=True,
    harmless=(
        *("data", "eval", "ngpus", "optim", "sampling", "training"),
        *("graph.file", "graph.report_all", "model.dropout", "model.name", "noise.sigma_max", "noise.sigma_min"),
    ),
    tokenizer=adaln.GPT2,
    preset={"sampler": "ancestral", "steps": 128, "temperature": 1.0},
)
