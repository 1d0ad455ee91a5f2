"""The facts about one family of checkpoints that its config.json does not state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dlm.formats.stored import Stored
from dlm.models.config import TransformerConfig

Config = Mapping[str, Any]
"""A config.json; `dlm.formats.keys.Keys` when a checkpoint is loaded."""


class Renaming(Protocol):
    """Tensor names of a family and ours; `dlm.formats.names.Names` is one."""

    def renamed(self, state: dict[str, Stored], where: Path, kinds: str) -> dict[str, Stored]:
        """The tensors, taken out of `state`, by our names. InputError for one that has no place."""


@dataclass(frozen=True)
class Family:
    """How to recognise and read a family.

    name: in messages and in our config.json. architectures: of config.json, for `model_type` lies; a config must also have `keys`, which
    are enough where a family names no architecture.
    shape: the backbone of a config. shift: row i of the logits predicts token i + 1. phase: where blocks begin, `prompt` or `zero`.
    mask_texts: texts that the mask may have in the tokenizer, for configs without mask_token_id.
    stop_texts: control tokens that end an answer besides those that the files name. preset: the official sampler's defaults.
    noise: the entry of our config.json, with `noise_keys` of the checkpoint's.
    packed: trained on windows that text fills to the end; the mask is then the last id unless a text names it. appends_mask: the checkpoint
    has no mask, and gets one as the id after its own.
    tokenizer: a hub id of the tokenizer, for families that ship none; `ascii`: a token is the code of its character.
    describe: the config of weights that may have been pickled and may come without one.
    mask_id: of the mask where neither config.json nor the tokenizer says. base: the model_type of Hugging Face whose keys and tensors it
    has: a GGUF file of that architecture may be read as of this family by name. causal: decoded from left to right, its masks draft.
    harmless: keys of its config.json that change no logit, besides those of every family (`dlm.formats.keys.HARMLESS`).
    """

    name: str
    architectures: tuple[str, ...]
    names: Renaming
    shape: Callable[[Config], TransformerConfig]
    mask_texts: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    shift: bool = False
    phase: str = "prompt"
    stop_texts: tuple[str, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=lambda: {"process": "masked", "schedule": "linear"})
    noise_keys: tuple[str, ...] = ()
    packed: bool = False
    appends_mask: bool = False
    tokenizer: str = ""
    mask_id: int | None = None
    base: str = ""
    causal: bool = False
    harmless: tuple[str, ...] = ()
    describe: Callable[[Path, dict[str, Stored]], Config] | None = None

    def recognises(self, config: Config) -> bool:
        """A family without architecture goes by its keys, one without either by name alone."""
        named = not self.architectures or any(name in self.architectures for name in config.get("architectures") or ())
        return named and all(key in config for key in self.keys) and bool(self.architectures or self.keys)
