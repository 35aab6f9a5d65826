"""Rate limit of log lines that callers can cause."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class RateLimit(logging.Filter):
    """Filter that lets `burst` records of a place in the code pass in `seconds`, and then says how many it dropped."""

    def __init__(self, burst: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._burst, self._seconds, self._clock = burst, seconds, clock
        self._places: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        place, now = (record.pathname, record.lineno), self._clock()
        since, count = self._places.get(place, (now, 0))
        if now - since >= self._seconds:
            dropped, since, count = max(0, count - self._burst), now, 0
            if dropped:
                record.msg, record.args = f"{record.getMessage()} (and {dropped} more like it before)", ()
        self._places[place] = since, count + 1
        return count < self._burst


class ForeignMetadata(RateLimit):
    """Filter of gRPC's own log, which shows the whole of a metadata value that is no text, a token perhaps."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "Invalid encoding" not in str(record.msg):
            return True
        record.msg, record.args, record.exc_info = "metadata of a call: text in UTF-8, got other bytes", (), None
        return super().filter(record)
