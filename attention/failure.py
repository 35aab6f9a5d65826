"""Failures of a strategy's own code, told apart from those of memory, storage and devices."""

from __future__ import annotations

import re
from types import TracebackType

import torch

from keysift.kvcache.errors import LONGEST_DETAIL, OffloadError, out_of_memory
from keysift.kvcache.ops import BackendUnavailable

from .strategy import Strategy

PATH = re.compile(r"(?<![\w/.])(?:/[^\s/'\",;:()]+){2,}/?")
"""An absolute path of at least two names."""


class StrategyFailure(RuntimeError):
    """A strategy's method raised an exception, or returned what is no lawful selection; the exception is the cause."""

    def __init__(self, strategy: str, method: str, cause: str) -> None:
        super().__init__(f"strategy {strategy}: {method} failed: {cause}")
        self.strategy = strategy
        self.method = method
        self.cause = cause


class Blame:
    """Context manager around a method of a strategy: what it raises becomes a `StrategyFailure` that names both.

    Failures of the machine pass as they are: no memory, no storage, no such kernel, a broken device; so does Ctrl-C.
    """

    __slots__ = ("_method", "_strategy")

    def __init__(self, strategy: Strategy, method: str) -> None:
        self._strategy = strategy
        self._method = method

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not _passes(error):
            raise StrategyFailure(name_of(self._strategy), self._method, describe(error)) from error


def name_of(strategy: Strategy) -> str:
    """The strategy's name; that of its class if the name itself raises."""
    try:
        return str(strategy.name)[:LONGEST_DETAIL]
    except Exception:
        return type(strategy).__name__.lower()


def describe(error: BaseException) -> str:
    """Class and message of an exception in one short line, without paths of the machine."""
    try:
        text = str(error.strerror if isinstance(error, OSError) else error)[: 2 * LONGEST_DETAIL]
        text = PATH.sub("(a path, see the log)", " ".join(text.split()))
    except Exception:  # a plug-in's exception may raise when it is printed
        text = ""
    return f"{type(error).__name__}{text and f': {text}'}"[:LONGEST_DETAIL]


def _passes(error: BaseException) -> bool:
    known = (
        StrategyFailure,
        OffloadError,
        BackendUnavailable,
        torch.AcceleratorError,
        KeyboardInterrupt,
        GeneratorExit,
    )
    return isinstance(error, known) or out_of_memory(error) is not None
