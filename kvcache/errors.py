"""Errors of the cache at run time."""

from __future__ import annotations


class OffloadError(RuntimeError):
    """Pages could not be written to the backing store or read from it.

    `exhausted`: for lack of room; otherwise the medium has failed.
    """

    def __init__(self, message: str, *, exhausted: bool = False) -> None:
        super().__init__(message)
        self.exhausted = exhausted
