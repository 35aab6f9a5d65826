"""Which twin of an op runs: decided per call, from the tensor, here and nowhere else."""

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
    """The backend that was asked for is not built here, or does not support the call."""


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Make every op inside the block run `backend`; ``auto`` chooses by the tensor's device.

    A backend that an op has no twin for leaves that op to its reference; one that is not built, or that
    cannot do the call, raises `BackendUnavailable`.
    """
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def op(*, native: str | None = None, triton: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a torch reference its twins, each spelled ``module:function`` and imported at first use.

    A twin has the reference's signature. It returns `NotImplemented` for a case that it does not support;
    the reference runs then.
    """
    twins = {"native": native, "triton": triton}

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            asked = _backend.get()
            name = _by_device(args[0]) if asked == "auto" else asked
            target = twins.get(name)
            twin = None if target is None else _load(target)
            result = NotImplemented if twin is None else twin(*args, **kwargs)
            if result is not NotImplemented:
                return cast(R, result)
            if asked not in ("auto", "reference") and target is not None:
                raise BackendUnavailable(
                    f"{reference.__name__}: the {asked} twin is not built or does not support this call"
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
