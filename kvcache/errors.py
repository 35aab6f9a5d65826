"""What can go wrong with pages while requests run."""

from __future__ import annotations


class OffloadError(RuntimeError):
    """Pages could not be written to their home or read from it.

    `exhausted`: there was no room for them; otherwise the medium has failed.
    """

    def __init__(self, message: str, *, exhausted: bool = False) -> None:
        super().__init__(message)
        self.exhausted = exhausted
