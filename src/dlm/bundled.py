"""The bundled models and data, by name, and the place of fetched bases. Imports no torch, so that `dlm list` answers at once."""

from __future__ import annotations

import os
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from dlm.errors import InputError
from dlm.files import read_json

PACKAGE = Path(str(resources.files("dlm")))
CHECKPOINTS, DATASETS = PACKAGE / "checkpoints", PACKAGE / "datasets"
BASES = ("smollm2-135m",)  # the bases that `dlm pull` fetches by name
CHAT_SAMPLING = {"smollm2-135m": {"temperature": 0.2, "top_p": 0.9}}
"""How the answers of those bases are drawn, whose files do not say it: the settings of their model cards."""
ADAPTER = "adapter.json"


def models() -> dict[str, Path]:
    """Directories of bundled checkpoints."""
    return {file.parent.name: file.parent for file in sorted(CHECKPOINTS.glob("*/config.json"))}


def sources() -> dict[str, str]:
    """The data that each bundled model was trained on, as `dlm train --data` names them."""
    return {name: read_json(path / "config.json")["training"]["data"] for name, path in models().items()}


def text_models() -> list[str]:
    """Names of the bundled models of text, `shakespeare-mask` first; the others fill in grids or write DNA."""
    of_text = [name for name, data in sources().items() if data in datasets() or data.endswith(".txt")]
    return sorted(of_text, key=lambda name: (name != "shakespeare-mask", name))


def chat_sampling(path: Path) -> dict[str, float]:
    """Of the fetched base at this path; nothing for another file."""
    named = path.suffix == ".gguf" and path.parent == cache_directory()
    return dict(CHAT_SAMPLING.get(path.stem, {})) if named else {}


def adapters() -> dict[str, Path]:
    """Directories of bundled adapters."""
    return {file.parent.name: file.parent for file in sorted(CHECKPOINTS.glob(f"*/{ADAPTER}"))}


def datasets() -> dict[str, Path]:
    """Bundled text files."""
    return {file.stem: file for file in sorted(DATASETS.glob("*.txt"))}


def text_files(source: str) -> list[Path]:
    """The files of a bundled data set, of a text file, or below a folder in the order of names. InputError where there are none."""
    path = datasets().get(source, Path(source))
    if source and path.is_dir():
        if not (files := sorted(p for p in path.rglob("*.txt") if p.is_file())):
            raise InputError(f"{path} holds no .txt file")
        return files
    if path.is_file():
        return [path]
    if close := get_close_matches(source, datasets(), n=1):
        raise InputError(f"no data at {source}: did you mean the bundled data set {close[0]}?")
    known = f"give a text file, a folder of .txt files, hf:DATASET, or a bundled data set ({', '.join(datasets())})"
    raise InputError(f"no data{f' at {source}' if source else ''}: {known}")


def cache_directory() -> Path:
    """The directory of fetched checkpoints: $DLM_CACHE, or `dlm` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DLM_CACHE") or Path(home) / "dlm")
