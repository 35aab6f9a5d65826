"""Scripts of benchmarks/ as modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@contextmanager
def imported(*names: str) -> Iterator[SimpleNamespace]:
    """These scripts by name, for a while: their neighbours have names that must not stay."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))
        own = {file.stem for file in BENCHMARKS.glob("*.py")}
        for name in (set(sys.modules) - before) & own:
            del sys.modules[name]
