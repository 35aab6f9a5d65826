"""Ctrl-C, and the exit status it leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C has ended."""


@contextmanager
def importing() -> Iterator[None]:
    """Ctrl-C ends the process at once: torch and transformers swallow an exception here and there, and go on broken."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
