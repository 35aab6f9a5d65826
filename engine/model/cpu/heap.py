"""Return of freed heap memory to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def release_heap() -> None:
    """Return freed heap memory to the system (malloc_trim of glibc); without glibc, do nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
