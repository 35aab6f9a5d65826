"""Errors of the cache at run time."""

from __future__ import annotations

import re

import torch

CPU_ALLOCATOR = re.compile(r"DefaultCPUAllocator: |not enough memory: ")
"""Message of torch for a failed allocation on a CPU, which has no exception class of its own."""
LONGEST_DETAIL = 300
"""Characters kept of an exception's message: torch's end with advice about its settings."""


class OffloadError(RuntimeError):
    """Pages could not be written to the backing store or read from it.

    `exhausted`: for lack of room; otherwise the medium has failed.
    """

    def __init__(self, message: str, *, exhausted: bool = False) -> None:
        super().__init__(message)
        self.exhausted = exhausted


def out_of_memory(error: BaseException) -> str | None:
    """Details of an allocation that failed, possibly empty; None: another error."""
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    text = str(error).partition("\n")[0]
    if found := CPU_ALLOCATOR.search(text):
        return text[found.end() :][:LONGEST_DETAIL]
    return text[:LONGEST_DETAIL] if isinstance(error, MemoryError | torch.OutOfMemoryError) else None
