"""Tensor names of other formats and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dlm.errors import InputError
from dlm.formats.keys import shown
from dlm.formats.stored import Stored

NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Names:
    """Their tensor names and ours. outside: of what no layer holds; layers: the prefix of a layer's number; inside: of a layer's own.

    `*` inside stands for the number of an expert. A name inside may end in the kind of tensor, in place of `weight`.
    """

    outside: Mapping[str, str]
    layers: str
    inside: Mapping[str, str]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # endings of buffers that follow from the config

    def ours(self, name: str) -> str | None:
        """Our name of a tensor; None for an ignored one. KeyError for one that has no place."""
        if name.endswith(self.ignored):
            return None
        stem, _, kind = name.rpartition(".")
        if stem in self.outside:
            return f"{self.outside[stem]}.{kind}"
        layer, _, rest = stem.removeprefix(self.layers).partition(".")
        if not stem.startswith(self.layers):
            raise KeyError(name)
        if (whole := f"{rest}.{kind}") in self.inside:
            return f"blocks.{layer}.{self.inside[whole]}"
        number = NUMBER.search(rest)
        if number is not None:
            return f"blocks.{layer}.{self.inside[NUMBER.sub('.*.', rest)].replace('*', number[1])}.{kind}"
        return f"blocks.{layer}.{self.inside[rest]}.{kind}"

    def theirs(self, name: str) -> str:
        """Their name of one of our tensors."""
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("blocks."):
            return f"{ {own: other for other, own in self.outside.items()}[stem] }.{kind}"
        _, layer, rest = stem.split(".", 2)
        return f"{self.layers}{layer}.{ {own: other for other, own in self.inside.items()}[rest] }.{kind}"

    def renamed(self, state: dict[str, Stored], where: Path, kinds: str) -> dict[str, Stored]:
        """The tensors, taken out of `state`, by our names. InputError for one that has no place; kinds: the models that it is none of."""
        found = {}
        for name in list(state):
            try:
                own = self.ours(name)
            except KeyError:
                raise InputError(f"{where} has a tensor {shown(name)}, which no {kinds} model has: it is of another architecture") from None
            tensor = state.pop(name)
            if own is not None:
                found[own] = tensor
        return found
