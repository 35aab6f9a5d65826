"""`keysift`, and `python -m keysift.server`: what must be settled before torch and the command line are imported."""

from __future__ import annotations

import os
import sys
import warnings

from .interrupts import importing

SPINS = "20000"
"""How long an idle OpenMP thread spins before it sleeps; libgomp's own default is 300,000.

A thread that spins keeps its core from the one that it waits for, once something else is running too. TPOT of
``keysift generate --prompt 'The capital of France is' --max-new-tokens 12 --json`` on two cores (AMD EPYC, 2026-11-22,
three runs each), the default against this setting: alone (16 tokens) 25-27 against 26-27 ms; beside one endless Python
loop 49-92 against 115-134; beside two 102-1,985 against 58-65; beside three 270-361 against 137-172. It bounds the
worst case and costs a little beside a single neighbour.
"""


def main() -> None:
    """The entry point."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # libgomp reads it when torch loads it, and never again
    if not sys.warnoptions:
        _hide_deprecations()
    with importing():
        from .commands.cli import main as command_line
    command_line()


def _hide_deprecations() -> None:
    """Keep what a dependency deprecates from users, who cannot act on it; `python -W default` shows it again."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(?!keysift\.)")


if __name__ == "__main__":
    main()
