"""Values that are made of files, and made again when these change."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from keysift.engine.errors import InvalidRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")
Version = tuple[tuple[int, int, int, int] | None, ...]

CHECK_S = 1.0
"""Time between two looks at the files."""


class Reloaded(Generic[T]):
    """Value of `make`, which is called again when one of `paths` has changed; any thread may ask for it.

    Files that are broken when the value is first made raise `InvalidRequest`. Later ones are logged, once for each
    change, and leave the value before in force; they are tried again, as the fault may have been another one's.
    """

    def __init__(
        self, paths: Sequence[Path], make: Callable[[], T], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._paths, self._make, self._clock = paths, make, clock
        self._lock = Lock()
        self._version = _version(paths)
        self._value = make()
        self._checked = clock()
        self._logged: tuple[Version, str] | None = None

    def __call__(self) -> T:
        """The value in force; looks at the files at most once every `CHECK_S` seconds."""
        with self._lock:
            if (now := self._clock()) - self._checked >= CHECK_S:
                self._checked = now
                if (version := _version(self._paths)) != self._version:
                    self._reload(version)
            return self._value

    def _reload(self, version: Version) -> None:
        names = " and ".join(map(str, self._paths))
        try:
            value = self._make()
        except Exception as error:  # whatever it is, callers with the files before go on
            problem = str(error) if isinstance(error, InvalidRequest) else repr(error)
            if self._logged != (version, problem):
                logger.error("%s has changed, but what was read before stays in force: %s", names, problem)
            self._logged = version, problem
            return
        if _version(self._paths) == version:  # else it was being written
            self._value, self._version, self._logged = value, version, None
            logger.info("%s has changed and was read again", names)


def _version(paths: Sequence[Path]) -> Version:
    """Changes when a file does; None in place of one that is missing."""
    return tuple(map(_identity, paths))


def _identity(path: Path) -> tuple[int, int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino
