"""Benchmark modules in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
"""The repository, from which `python -m benchmarks.x` runs."""


def command(module: str, *words: object) -> list[str]:
    """The command line that runs a module with this Python."""
    return [sys.executable, "-m", module, *map(str, words)]


def printed(module: str, *words: object, capture_errors: bool = False) -> dict[str, Any]:
    """The JSON object in the last line that a module prints. Raises `CalledProcessError` where it fails.

    Args:
        capture_errors: keep stderr in the exception instead of passing it through.
    """
    errors = subprocess.PIPE if capture_errors else None
    done = subprocess.run(
        command(module, *words), check=True, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
