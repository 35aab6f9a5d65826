"""Entry point of `keysift` and `python -m keysift.server`: settings that must precede the import of torch."""

from __future__ import annotations

import os
import sys
import warnings

from .interrupts import importing

SPINS = "20000"
"""Spins of an idle OpenMP thread before it sleeps (GOMP_SPINCOUNT); libgomp's default is 300,000.

On a busy machine a spinning thread occupies the core of the thread that it waits for. TPOT of ``keysift generate
--prompt 'The capital of France is' --max-new-tokens 12 --json`` on two cores (AMD EPYC, 2026-11-22, three runs each),
the default against this setting: alone (16 tokens) 25-27 against 26-27 ms; with one endless Python loop 49-92 against
115-134; with two 102-1,985 against 58-65; with three 270-361 against 137-172. It bounds the worst case and costs a
little with a single loop.
"""


def main() -> None:
    """Set the environment, then run the command line."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read once, when torch loads libgomp
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read with grpc: else each handshake that fails writes a line
    if not sys.warnoptions:
        _hide_deprecations()
    with importing():
        from .commands.cli import main as command_line
    command_line()


def _hide_deprecations() -> None:
    """Ignore deprecation warnings of other packages; `python -W default` shows them."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(?!keysift\.)")


if __name__ == "__main__":
    main()
