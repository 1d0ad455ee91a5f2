"""The facts about one family of checkpoints that its config.json does not state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dlm.errors import InputError
from dlm.formats.names import Names
from dlm.models.config import TransformerConfig

Config = Mapping[str, Any]
"""A config.json."""


@dataclass(frozen=True)
class Family:
    """How to recognise and read a family.

    name: in messages and in our config.json. architectures: of config.json, for `model_type` lies; a config must also have `keys`.
    shape: the backbone of a config. shift: row i of the logits predicts token i + 1. phase: where blocks begin, `prompt` or `zero`.
    mask_texts: texts that the mask may have in the tokenizer, for configs without mask_token_id.
    stop_texts: control tokens that end an answer besides those that the files name. preset: the official sampler's defaults.
    """

    name: str
    architectures: tuple[str, ...]
    names: Names
    shape: Callable[[Config], TransformerConfig]
    mask_texts: tuple[str, ...]
    keys: tuple[str, ...] = ()
    shift: bool = False
    phase: str = "prompt"
    stop_texts: tuple[str, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)

    def recognises(self, config: Config) -> bool:
        return any(name in self.architectures for name in config.get("architectures") or ()) and all(key in config for key in self.keys)


def require(config: Config, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """InputError for a key with a value that the backbone does not have; an absent key has its default."""
    for key, values in allowed.items():
        if config.get(key, values[0]) not in values:
            raise InputError(f"{key} = {config[key]!r} is not supported (only {' or '.join(repr(value) for value in values)})")
