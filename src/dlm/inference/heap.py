"""Freed memory that glibc keeps, so that the activations of a forward pass are not mapped anew in the next one."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt, and bytes for each: those that glibc itself comes to at most
BYTES = {TRIM_THRESHOLD: 2**26, MMAP_THRESHOLD: 2**25}


@cache
def keep_freed_memory() -> bool:
    """Raise both thresholds of malloc, once for the process; False where malloc is not glibc's or the environment sets them.

    Below them memory goes back to the system as soon as it is free at the end of the heap, and page faults take up to a fifth of a forward
    pass in bfloat16.
    """
    told = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys() or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not told else None
    return mallopt is not None and all(bool(mallopt(name, size)) for name, size in BYTES.items())
