"""A checkpoint ready to use: `load` gives a `LanguageModel`, where networks, noise, text and samplers meet."""

from dlm.language_model.model import LanguageModel, load

__all__ = ["LanguageModel", "load"]
