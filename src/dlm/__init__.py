"""Diffusion language models: train, sample, watch, measure.

import dlm
model = dlm.load("shakespeare-mask")
print(model.generate("ROMEO:", length=512, seed=0))
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load": "dlm.language_model",
    "LanguageModel": "dlm.language_model",
    "Generation": "dlm.language_model.generation",
    "Canvas": "dlm.trajectory",
    "Frame": "dlm.trajectory",
    "Trajectory": "dlm.trajectory",
    "InputError": "dlm.errors",
    "MaskedNoise": "dlm.noise.masked",
    "UniformNoise": "dlm.noise.uniform",
    "SemanticNoise": "dlm.noise.semantic",
    "HybridNoise": "dlm.noise.hybrid",
    "Transformer": "dlm.models.transformer",
    "TransformerConfig": "dlm.models.config",
    "KVCache": "dlm.models.cache",
    "Draw": "dlm.sampling.draw",
    "Ancestral": "dlm.sampling.diffusion.unmasking",
    "TopScore": "dlm.sampling.diffusion.unmasking",
    "Threshold": "dlm.sampling.diffusion.unmasking",
    "DiffusionSampler": "dlm.sampling.diffusion.loop",
    "AutoregressiveSampler": "dlm.sampling.autoregressive.plain",
    "Tokenizer": "dlm.text.tokenizer",
    "TrainConfig": "dlm.train.loop",
    "train": "dlm.train.loop",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
