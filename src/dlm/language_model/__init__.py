"""A checkpoint ready to use: `load` gives a `LanguageModel`, where networks, noise, text and samplers meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm.language_model.model import LanguageModel, load

__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """Imported when it is used: `dlm.language_model.options` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'dlm.language_model' has no attribute {name!r}")
    from dlm.language_model import model

    return getattr(model, name)
