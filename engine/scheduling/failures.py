"""Failures that end one request and not the engine: out of memory, and errors of the backing store."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import torch

from keysift.kvcache import OffloadError

logger = logging.getLogger(__name__)

CPU_ALLOCATOR = re.compile(r"DefaultCPUAllocator: |not enough memory: ")
"""Message of torch for a failed allocation on a CPU, which has no exception class of its own."""
LONGEST_DETAIL = 300
"""Characters kept of torch's message, which ends with advice about its settings."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Reason that a request cannot continue."""

    text: str
    exhausted: bool
    """There was no room: the same request may succeed with more. Otherwise something is broken."""
    lost: bool = False
    """The request's pages, those of earlier steps too, may not hold what was written to them."""


def failure_of(error: Exception, doing: str) -> Failure | None:
    """The failure of a request that met `error` while `doing`; None: the error is a bug and ends the engine."""
    if isinstance(error, OffloadError):
        failure = Failure(str(error), error.exhausted, lost=True)
    elif (detail := _out_of_memory(error)) is not None:
        failure = Failure(f"memory: not enough for {doing}{detail and f' ({detail})'}", exhausted=True)
    else:
        return None
    logger.warning("%s", failure.text, exc_info=error)
    return failure


def _out_of_memory(error: Exception) -> str | None:
    """Details of an allocation that failed, possibly empty; None: another error."""
    text = str(error).partition("\n")[0]
    if isinstance(error, RuntimeError) and (found := CPU_ALLOCATOR.search(text)):
        return text[found.end() :][:LONGEST_DETAIL]
    return text[:LONGEST_DETAIL] if isinstance(error, MemoryError | torch.OutOfMemoryError) else None
