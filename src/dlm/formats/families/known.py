"""Which family a checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm.errors import InputError
from dlm.files import read_json
from dlm.formats import gguf, native
from dlm.formats.families import a2d, bd3lm, dream, duo, gidd, llada, mdlm, sdar, sedd
from dlm.formats.families.record import Family

FAMILIES: tuple[Family, ...] = (
    llada.LLADA,
    dream.DREAM,
    a2d.QWEN2,
    a2d.QWEN3,
    a2d.LLAMA,
    sdar.SDAR,
    mdlm.MDLM,
    bd3lm.BD3LM,
    duo.DUO,
    gidd.GIDD,
    sedd.SEDD,
)


def of(path: Path) -> Family | None:
    """The family of a directory or a GGUF file; None for a checkpoint of ours and for a base that `huggingface` converts.

    InputError for an architecture that nothing here reads.
    """
    if path.suffix == ".gguf" and path.is_file():
        kind = gguf.architecture(path)
        return next((family for family in FAMILIES if family.name == kind and kind in gguf.DIFFUSION), None)
    config = read_json(path / "config.json")
    if not isinstance(config, Mapping) or config.get("model_type") == "dlm":
        return None
    for family in FAMILIES:
        if family.recognises(config):
            return family
    if config.get("model_type") in native.CONVERTIBLE:
        return None
    raise InputError(unknown(config, path))


def unknown(config: Mapping[str, Any], path: Path) -> str:
    """The error for a checkpoint that no family recognises."""
    architectures = config.get("architectures")
    named = ", ".join(map(str, architectures)) if isinstance(architectures, list) and architectures else "no architecture"
    code = "; it demands code of its own (auto_map), which dlm never runs" if config.get("auto_map") else ""
    known = [name for family in FAMILIES for name in family.architectures or (family.name.upper(),)]
    kinds = ", ".join([*known, *native.CONVERTIBLE])
    return f"{path} is a checkpoint of kind {config.get('model_type')!r} ({named}), which dlm does not read{code}. Known: {kinds}"
