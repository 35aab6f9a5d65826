"""Strategies of other packages, by entry points. One that does not load breaks nothing but requests that name it."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from keysift.kvcache import Phase

from .failure import describe
from .strategy import LARGEST, Strategy

GROUP = "keysift.strategies"
"""Entry points of plug-ins."""
logger = logging.getLogger(__name__)


def entries() -> tuple[EntryPoint, ...]:
    """The entry points of all installed packages; looked up again when `sys.path` has changed."""
    return _entries(tuple(sys.path))


@functools.lru_cache(maxsize=4)
def _entries(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    try:
        return tuple(entry_points(group=GROUP))
    except Exception:  # the metadata of any package may be damaged
        logger.warning("no plug-ins: the entry points of the installed packages cannot be read", exc_info=True)
        return ()


@functools.lru_cache(maxsize=256)
def load(entry: EntryPoint, examine: Callable[[type[Strategy]], object]) -> type[Strategy] | str:
    """Class of the plug-in, or the reason that it cannot be used; tried once. `examine` raises for unusable options."""
    try:
        loaded = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # importing a module runs it: it may raise, or exit
        return f"{entry.value} does not load: {describe(error)}"
    if not (isinstance(loaded, type) and issubclass(loaded, Strategy)):
        return f"{entry.value} is no class derived from keysift.attention.Strategy, but {type(loaded).__name__}"
    try:
        examine(loaded)
    except Exception as error:
        return f"the options of {entry.value} cannot be read: {describe(error)}"
    return loaded


def fault_of(made: Strategy) -> str | None:
    """The method that fails, of those that the scheduler calls for whole batches, and how; None: each returns."""
    for method, call in CALLS.items():
        try:
            call(made)
        except (Exception, SystemExit) as error:
            return f"{method} failed: {describe(error)}"
    return None


def _parts(made: Strategy) -> None:
    for phase in Phase:
        for part in (made.part(phase), made.at(phase, 1, 1), made.at(phase, LARGEST, 1)):
            if not isinstance(part, Strategy):
                raise TypeError(f"a Strategy is expected, got {type(part).__name__}")


CALLS: dict[str, Callable[[Strategy], object]] = {
    "__hash__": hash,  # batches are grouped by it
    "__eq__": lambda made: bool(made == made),
    "__repr__": repr,  # a part of the keys of cached prefixes
    "name": lambda made: made.name + "",
    "part": _parts,
    "index_spec": lambda made: hash(made.index_spec()),
    "remembers": lambda made: bool(made.remembers),
    "rows_at_the_end": lambda made: range(made.rows_at_the_end),
    "scans": lambda made: bool(made.scans),
}
