"""Ops over the cache: each is a plain torch function with a Triton twin beside it."""

from .dispatch import BackendUnavailable, use_backend

__all__ = ["BackendUnavailable", "use_backend"]
