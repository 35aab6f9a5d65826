"""Failures of single requests, and what they say: whatever a request meets ends that request and not the engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from keysift.attention import StrategyFailure
from keysift.attention.failure import describe
from keysift.kvcache import OffloadError, out_of_memory

from ..errors import EngineBroken

logger = logging.getLogger(__name__)


class PartFailed(Exception):
    """Error of one part of a request's work, which has no name of its own to give."""

    def __init__(self, part: str, cause: BaseException) -> None:
        super().__init__(f"{part} failed with {describe(cause)}")


@dataclass(frozen=True, slots=True)
class Failure:
    """Reason that a request cannot continue."""

    text: str
    exhausted: bool
    """There was no room: the same request may succeed with more. Otherwise something is broken."""
    lost: bool = False
    """The request's pages, those of earlier steps too, may not hold what was written to them."""
    unexpected: bool = False
    """The cause is unknown: a bug of a strategy or of the engine, or hardware."""


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Block whose unexpected errors are raised as `PartFailed`, a Rust panic, which is no `Exception`, too."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, OffloadError, EngineBroken):
        raise
    except BaseException as error:
        if out_of_memory(error) is not None:
            raise
        raise PartFailed(part, error) from error


def failure_of(error: Exception, doing: str) -> Failure:
    """The failure of a request that met `error` while `doing`. Raises the error of an engine that cannot continue."""
    if isinstance(error, EngineBroken):
        raise error
    if isinstance(error, OffloadError):
        failure = Failure(str(error), error.exhausted, lost=True)
    elif (detail := out_of_memory(error)) is not None:
        failure = Failure(f"memory: not enough for {doing}{detail and f' ({detail})'}", exhausted=True)
    else:
        failure = Failure(_described(error, doing), exhausted=False, unexpected=True)
    logger.warning("%s", failure.text, exc_info=error)
    return failure


def _described(error: Exception, doing: str) -> str:
    """Description of a failure: in the part's or the strategy's own words, or by the kind of exception alone.

    Other messages may tell of the server's files; they are in the log.
    """
    if isinstance(error, PartFailed | StrategyFailure):
        return str(error)
    return f"{doing} failed with {type(error).__name__}; see the log"
