"""Dispatch of an op to its reference or to one of its twins, for each call, by the device of its first tensor."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")
Backend = Literal["auto", "reference", "native", "triton"]

logger = logging.getLogger(__name__)
_backend: ContextVar[Backend] = ContextVar("keysift_backend", default="auto")


class BackendUnavailable(RuntimeError):
    """The backend of `use_backend` is not built here, or does not support the call."""


class UnsupportedCall(Exception):
    """Raised by a twin for arguments that only the reference supports, before it has written anything."""


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Make every op inside the block run `backend`; ``auto`` chooses by the tensor's device.

    An op without such a twin runs its reference; a twin that is not built, or that does not support the call, raises
    `BackendUnavailable`.
    """
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def op(*, native: str | None = None, triton: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a torch reference its twins, each spelled ``module:function`` and imported at first use.

    A twin has the reference's signature. It raises `UnsupportedCall` for a case that it does not support; the reference
    runs then.
    """
    twins = {"native": native, "triton": triton}

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            backend = _backend.get()
            target = twins.get(_by_device(args[0]) if backend == "auto" else backend)
            twin = None if target is None else _load(target)
            if twin is not None:
                try:
                    return cast(R, twin(*args, **kwargs))
                except UnsupportedCall:
                    pass
            if backend not in ("auto", "reference") and target is not None:
                raise BackendUnavailable(
                    f"{reference.__name__}: the {backend} twin is not built or does not support this call"
                )
            return reference(*args, **kwargs)

        return call

    return decorate


def _by_device(tensor: object) -> Backend:
    assert isinstance(tensor, torch.Tensor), "an op's first argument is a tensor"
    return "triton" if tensor.is_cuda else "native"


@functools.cache
def _load(target: str) -> Callable[..., object] | None:
    """The twin, or None where its compiler or its package is missing."""
    module, _, function = target.partition(":")
    try:
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
    except ImportError as error:
        logger.warning("the torch reference runs instead of %s: %s", target, error)
        return None
