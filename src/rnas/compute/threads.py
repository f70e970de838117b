"""What a process of rnas's own sets before torch is imported. As a library, rnas leaves it to its host."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def settle() -> None:
    """Threads that wait briefly before they sleep, and freed memory that is kept to be used again.

    Threads that spin for long while they wait slow each other down without bound where other programs share the cores;
    ones that never spin are slow on idle cores (docs/decisions/004). OpenMP reads this when torch is imported. What the
    environment says already stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if not any(name.startswith("MALLOC_") for name in os.environ):
        _keep_memory()


def _keep_memory() -> None:
    """glibc's malloc otherwise gives an activation's memory back and gets it again, page by page, all the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes: larger ones are mapped one by one
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
