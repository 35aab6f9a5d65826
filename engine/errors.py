"""Errors of the engine. Each message names the field, the limit and the value."""

from __future__ import annotations

from reprlib import Repr

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def shortened(value: object) -> str:
    """A value as messages show it: of long ones the beginning and the end, whatever the whole would cost."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"{type(value).__name__} too long to show"


class KeysiftError(Exception):
    """Base of every error that Keysift raises on purpose."""


class InvalidRequest(KeysiftError, ValueError):
    """A field of a request or of the configuration is out of bounds."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class ModelNotFound(KeysiftError):
    """There is no model of the name that a request or a command states."""


class DuplicateRequest(KeysiftError):
    """The id is that of a live request."""


class Unsupported(KeysiftError):
    """A strategy, a model or an option does not fit the others; nothing was started."""


class NoChoice(KeysiftError):
    """The model returned scores that no next token can be chosen from, such as NaN."""


class ResourceExhausted(KeysiftError):
    """The queue or the KV cache has no room for the request."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineBroken(KeysiftError):
    """The engine cannot run any request any more."""
