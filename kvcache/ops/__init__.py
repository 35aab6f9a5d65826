"""Ops over the cache: a torch reference each, with native and Triton twins in its folder."""

from .dispatch import BackendUnavailable, use_backend

__all__ = ["BackendUnavailable", "use_backend"]
