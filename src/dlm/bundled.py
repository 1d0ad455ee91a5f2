"""The bundled models and data, by name, and the place of fetched bases. Imports no torch, so that `dlm list` answers at once."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

PACKAGE = Path(str(resources.files("dlm")))
CHECKPOINTS, DATASETS = PACKAGE / "checkpoints", PACKAGE / "datasets"
BASES = ("smollm2-135m",)  # the bases that `dlm pull` fetches by name
ADAPTER = "adapter.json"


def models() -> dict[str, Path]:
    """Directories of bundled checkpoints."""
    return {file.parent.name: file.parent for file in sorted(CHECKPOINTS.glob("*/config.json"))}


def adapters() -> dict[str, Path]:
    """Directories of bundled adapters."""
    return {file.parent.name: file.parent for file in sorted(CHECKPOINTS.glob(f"*/{ADAPTER}"))}


def datasets() -> dict[str, Path]:
    """Bundled text files."""
    return {file.stem: file for file in sorted(DATASETS.glob("*.txt"))}


def cache_directory() -> Path:
    """The directory of fetched checkpoints: $DLM_CACHE, or `dlm` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DLM_CACHE") or Path(home) / "dlm")
