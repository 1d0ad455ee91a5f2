"""Files that a reader never sees half written."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """UTF-8, to a temporary name beside it first. errors: as of `str.encode`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8", errors=errors)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
