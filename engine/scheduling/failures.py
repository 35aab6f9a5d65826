"""What ends one request and not the engine: memory that ran out, pages that their home cannot take or give."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import torch

from keysift.kvcache import OffloadError

logger = logging.getLogger(__name__)

CPU_ALLOCATOR = re.compile(r"DefaultCPUAllocator: |not enough memory: ")
"""What torch says where the CPU has no room; it has no class of its own for that."""
LONGEST_DETAIL = 300
"""Characters of torch's own account, which goes on with advice about its settings."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request cannot go on."""

    text: str
    exhausted: bool
    """There was no room; the same request may succeed where there is more. Otherwise something is broken."""
    lost: bool = False
    """Its pages, those of earlier steps too, may not hold what was written to them."""


def failure_of(error: Exception, doing: str) -> Failure | None:
    """What `error` means for the request that met it while `doing`; None: it is a bug, and nobody can go on."""
    if isinstance(error, OffloadError):
        failure = Failure(str(error), error.exhausted, lost=True)
    elif (detail := _want_of_memory(error)) is not None:
        failure = Failure(f"memory: not enough for {doing}{detail and f' ({detail})'}", exhausted=True)
    else:
        return None
    logger.warning("%s", failure.text, exc_info=error)
    return failure


def _want_of_memory(error: Exception) -> str | None:
    """What the error tells about the memory that was asked for, maybe nothing; None: it is about something else."""
    text = str(error).partition("\n")[0]
    if isinstance(error, RuntimeError) and (found := CPU_ALLOCATOR.search(text)):
        return text[found.end() :][:LONGEST_DETAIL]
    return text[:LONGEST_DETAIL] if isinstance(error, MemoryError | torch.OutOfMemoryError) else None
