"""What can be wrong with a request. Each error names the field, the limit and the value."""

from __future__ import annotations


class KeysiftError(Exception):
    """Base of every error that Keysift raises on purpose."""


class InvalidRequest(KeysiftError, ValueError):
    """A field of a request or of the configuration is out of bounds."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class ModelNotFound(KeysiftError):
    """The model that a request or a command names is not there."""


class DuplicateRequest(KeysiftError):
    """A live request already carries this id."""


class Unsupported(KeysiftError):
    """A strategy or an option does not fit the loaded model; nothing was started."""


class ResourceExhausted(KeysiftError):
    """The queue or the KV cache cannot take the request now."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
