"""Diffusion language models: train, sample, watch, measure.

import dlm
model = dlm.load("shakespeare-mask")
print(model.generate("ROMEO:", length=512, seed=0))
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time each name is imported when it is first used
    from dlm.adapters.train import ConvertConfig as ConvertConfig
    from dlm.errors import InputError as InputError
    from dlm.language_model import LanguageModel as LanguageModel
    from dlm.language_model import load as load
    from dlm.language_model.generation import Generation as Generation
    from dlm.language_model.options import DecodingOptions as DecodingOptions
    from dlm.language_model.options import Draft as Draft
    from dlm.models.cache import KVCache as KVCache
    from dlm.models.config import TransformerConfig as TransformerConfig
    from dlm.models.transformer import Transformer as Transformer
    from dlm.noise.hybrid import HybridNoise as HybridNoise
    from dlm.noise.masked import MaskedNoise as MaskedNoise
    from dlm.noise.process import register_noise as register_noise
    from dlm.noise.semantic import SemanticNoise as SemanticNoise
    from dlm.noise.uniform import UniformNoise as UniformNoise
    from dlm.sampling.autoregressive.plain import AutoregressiveSampler as AutoregressiveSampler
    from dlm.sampling.diffusion.loop import DiffusionSampler as DiffusionSampler
    from dlm.sampling.diffusion.unmasking import Ancestral as Ancestral
    from dlm.sampling.diffusion.unmasking import Threshold as Threshold
    from dlm.sampling.diffusion.unmasking import TopScore as TopScore
    from dlm.sampling.draw import Draw as Draw
    from dlm.sampling.registry import SamplerInfo as SamplerInfo
    from dlm.sampling.registry import register_drafter as register_drafter
    from dlm.sampling.registry import register_sampler as register_sampler
    from dlm.text.tokenizer import Tokenizer as Tokenizer
    from dlm.train.config import TrainConfig as TrainConfig
    from dlm.trajectory import Canvas as Canvas
    from dlm.trajectory import Frame as Frame
    from dlm.trajectory import Trajectory as Trajectory
    from dlm.workflows import schedule as schedule
    from dlm.workflows.calibrate import calibrate as calibrate
    from dlm.workflows.convert import SelfDistillation as SelfDistillation
    from dlm.workflows.convert import convert as convert
    from dlm.workflows.curse import curse as curse
    from dlm.workflows.evaluate import evaluate as evaluate
    from dlm.workflows.export import export as export
    from dlm.workflows.fit import fit as fit
    from dlm.workflows.settle import settle as settle

__version__ = "0.1.0"


def _wait_passively() -> None:
    """Threads of OpenMP sleep while they wait for one another, unless the environment says otherwise.

    By default they spin, and where another program keeps a core busy every small operation waits for a thread that is not run: a forward
    pass takes ten times as long. OpenMP reads this once, when torch is imported.
    """
    for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("KMP_BLOCKTIME", "0")):  # of GNU's and of LLVM's OpenMP
        os.environ.setdefault(name, value)


_wait_passively()

_WHERE = {  # public name: its module, and its name there where that is another; nothing after the colon: the module
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
    "SamplerInfo": "dlm.sampling.registry",
    "register_sampler": "dlm.sampling.registry",
    "register_drafter": "dlm.sampling.registry",
    "register_noise": "dlm.noise.process",
    "DecodingOptions": "dlm.language_model.options",
    "Draft": "dlm.language_model.options",
    "AutoregressiveSampler": "dlm.sampling.autoregressive.plain",
    "Tokenizer": "dlm.text.tokenizer",
    "evaluate": "dlm.workflows.evaluate",
    "export": "dlm.workflows.export",
    "calibrate": "dlm.workflows.calibrate",
    "curse": "dlm.workflows.curse",
    "settle": "dlm.workflows.settle",
    "TrainConfig": "dlm.train.config",
    "fit": "dlm.workflows.fit",
    "schedule": "dlm.workflows.schedule:",
    "convert": "dlm.workflows.convert",
    "ConvertConfig": "dlm.adapters.train",
    "SelfDistillation": "dlm.workflows.convert",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dlm' has no attribute {name!r}")
    where, colon, attribute = _WHERE[name].partition(":")
    module = importlib.import_module(where)
    return module if colon and not attribute else getattr(module, attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
