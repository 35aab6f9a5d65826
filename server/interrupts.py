"""Ctrl-C during imports, and its exit status."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit status of a command ended by Ctrl-C."""


@contextmanager
def importing() -> Iterator[None]:
    """Block in which Ctrl-C ends the process at once: torch and transformers catch exceptions during their import."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
