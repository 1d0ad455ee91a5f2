"""Which family a checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm.errors import InputError, nearest
from dlm.files import read_json
from dlm.formats import bridge as bridges
from dlm.formats import gguf, native
from dlm.formats.families import (
    a2d,
    bd3lm,
    diffullama,
    dream,
    duo,
    fast_dllm,
    gidd,
    idlm,
    llada,
    llada2,
    llada_moe,
    mdlm,
    nemotron,
    open_dcoder,
    sdar,
    sedd,
    tiny_diffusion,
)
from dlm.formats.families.record import Family

FAMILIES: tuple[Family, ...] = (
    llada.LLADA,
    dream.DREAM,
    a2d.QWEN2,
    a2d.QWEN3,
    a2d.LLAMA,
    sdar.SDAR,
    llada_moe.LLADA_MOE,
    llada2.LLADA2,
    mdlm.MDLM,
    bd3lm.BD3LM,
    duo.DUO,
    gidd.GIDD,
    sedd.SEDD,
    nemotron.NEMOTRON,
    fast_dllm.FAST_DLLM,
    idlm.IDLM,
    open_dcoder.OPEN_DCODER,
    diffullama.DIFFULLAMA,
    tiny_diffusion.TINY_DIFFUSION,
)


def of(path: Path, name: str = "") -> Family | None:
    """The family of a directory or a GGUF file; None for a checkpoint of ours and for a base that `huggingface` converts.

    name: of a family to read it as, where a plain config says nothing. InputError for an architecture that nothing here reads.
    """
    if name:
        return forced(path, name)
    if path.suffix == ".gguf" and path.is_file():
        kind = gguf.architecture(path)
        return next((family for family in FAMILIES if family.name == kind and kind in gguf.DIFFUSION), None)
    if path.suffix == ".pt" and path.is_file():
        return tiny_diffusion.TINY_DIFFUSION
    config = read_json(path / "config.json")
    if not isinstance(config, Mapping) or config.get("model_type") == "dlm":
        return None
    for family in FAMILIES:
        if family.recognises(config):
            return family
    if config.get("model_type") in native.CONVERTIBLE:
        return None
    raise InputError(unknown(config, path))


def forced(path: Path, name: str) -> Family:
    """The family of this name. InputError for an unknown one, for a checkpoint of ours, and for a GGUF file of another architecture."""
    known = {family.name: family for family in FAMILIES}
    if name not in known:
        raise InputError(f"no family {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    family = known[name]
    if path.suffix == ".gguf":
        kind = gguf.architecture(path)
        if kind not in (family.base, family.name):
            needed = family.base or (family.name if family.name in gguf.DIFFUSION else "")
            told = f"is one of a {needed} file" if needed else "has no GGUF form"
            raise InputError(f"{path} is a GGUF file of a {kind} model: the family {name} {told}")
    elif path.is_dir() and read_json(path / "config.json").get("model_type") == "dlm":
        raise InputError(f"{path} is a checkpoint of dlm's own, which says what it is: leave --family away")
    return family


def preset(name: str) -> Mapping[str, Any] | None:
    """The official settings of a family; None for ours and for autoregressive bases."""
    return next((family.preset for family in FAMILIES if family.name == name), None)


def unknown(config: Mapping[str, Any], path: Path) -> str:
    """The error for a checkpoint that no family recognises."""
    architectures = config.get("architectures")
    named = ", ".join(map(str, architectures)) if isinstance(architectures, list) and architectures else "no architecture"
    code = "; it demands code of its own (auto_map), which dlm never runs" if config.get("auto_map") else ""
    known = [name for family in FAMILIES for name in family.architectures or (family.name.upper(),) * bool(family.keys)]
    kinds = ", ".join([*known, *native.CONVERTIBLE])
    if bridge := [name for name in bridges.CLASSES if name in (architectures or ())]:
        return f"{path} is a {bridge[0]}, which the class of transformers reads: add --bridge transformers"
    by_hand = ", ".join(family.name for family in FAMILIES if not (family.architectures or family.keys))
    kind = config.get("model_type")
    return f"{path} is a checkpoint of kind {kind!r} ({named}), which dlm does not read{code}. Known: {kinds}; by --family: {by_hand}"
