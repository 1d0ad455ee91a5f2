"""The keys of a config.json or of a GGUF header: each one is read, or known to change nothing, or refused by its name."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dlm.errors import InputError

HARMLESS = (  # keys of a config.json that change no logit: of training, of tokens and sampling, of memory, and of who wrote it
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "do_sample",
    "dropout",
    "dtype",
    "embedding_dropout",
    "eos_token_id",
    "finetuning_task",
    "fuse_cross_entropy",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "mask_token_id",
    "max_length",
    "max_new_tokens",
    "model_type",
    "name_or_path",
    "neftune_noise_alpha",
    "num_labels",
    "output_attentions",
    "output_dropout",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "residual_dropout",
    "return_dict",
    "router_aux_loss_coef",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention",
)
SHOWN = 60  # characters of a value in a message


class Keys(Mapping[str, Any]):
    """A mapping that remembers which of its keys were read. Mappings inside are of this kind too.

    `in` and iteration read nothing; `**` and `dict` read everything.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.plain = data
        self._read: set[str] = set()
        self._inner: dict[str, Keys] = {}

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        value = self.plain[key]
        return self._inner.setdefault(key, Keys(value)) if isinstance(value, Mapping) else value

    def __contains__(self, key: object) -> bool:
        return key in self.plain

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)

    def __repr__(self) -> str:
        return repr(self.plain)

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**62) -> int:
        """A whole number from `least` to `most`. KeyError for an absent key without default, ValueError for anything else."""
        value = self[key] if default is None else self.get(key, default)
        if type(value) is not int or not least <= value <= most:
            limit = f"of at least {least}" if type(value) is not int or value < least else f"of at most {most}"
            raise ValueError(f"{key} is {told(value)}, not a whole number {limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. Errors as of `whole`."""
        value = self[key] if default is None else self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{key} is {told(value)}, not a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """ValueError for a value that is neither true nor false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise ValueError(f"{key} is {told(value)}, neither true nor false")
        return value

    def unread(self) -> dict[str, Any]:
        """Keys that nobody read, and their values; null says as much as no key."""
        found = {key: value for key, value in self.plain.items() if key not in self._read and value is not None}
        for key, inner in self._inner.items():
            found |= {f"{key}.{name}": value for name, value in inner.unread().items()}
        return found

    def refuse_unread(self, where: str, harmless: Collection[str] = ()) -> None:
        """InputError for the first key that was neither read nor is `harmless`, which says that it changes no logit."""
        for key, value in sorted(self.unread().items()):
            if key not in harmless:
                raise InputError(f"{where}: dlm does not know the key {shown(key)} = {told(value)}: take it out if it changes no logit")


def shown(name: str) -> str:
    """A name of a file as messages show it: on one line, without quotes."""
    return repr(name)[1:-1]


def told(value: Any) -> str:
    """A value as messages show it, on one line."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + " .."


def require(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """InputError for a key with a value that the backbone does not have; an absent key has its default."""
    for key, values in allowed.items():
        found = config.get(key, values[0])
        if not any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in values):  # 0 is not false
            raise InputError(f"{key} = {told(found)} is not supported (only {' or '.join(repr(value) for value in values)})")
