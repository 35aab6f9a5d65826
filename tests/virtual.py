"""Virtual devices: CPU tensors labelled with a device, and an error for operations that mix devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = torch.device("cpu")
CROSSING = {"copy_", "index", "_to_copy", "_index_put_impl_", "index_put_"}
"""Ops that take tensors of several devices on real devices, too; the indexing ones only indices on the host."""


def device_of(tensor: Tensor) -> torch.device:
    """``cpu:0`` or ``cpu:1`` for a tensor on a virtual device, ``cpu`` for one on the host."""
    return getattr(tensor, "_virtual", HOST)


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """Label the tensor, in place."""
    tensor._virtual = device  # type: ignore[attr-defined]
    return tensor


class _Labels(TorchFunctionMode):
    """Labels as `Tensor.device`, set by functions that create tensors on a device or move them to one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is Tensor.device:
            return device_of(args[0])
        if func is Tensor.cpu:
            return put(args[0].clone(), HOST) if device_of(args[0]) != HOST else args[0]
        if func is Tensor.to and (target := _target(args, kwargs)) is not None:
            return _moved(args, kwargs, target)
        made = func(*args, **kwargs)
        if (device := kwargs.get("device")) is not None and isinstance(made, Tensor):
            put(made, torch.device(device))
        return made


def _target(args: Any, kwargs: Any) -> torch.device | None:
    found = [each for each in (*args[1:], kwargs.get("device")) if isinstance(each, torch.device | str)]
    return torch.device(found[0]) if found else None


def _moved(args: Any, kwargs: Any, target: torch.device) -> Tensor:
    dtypes = [each for each in (*args[1:], kwargs.get("dtype")) if isinstance(each, torch.dtype)]
    source: Tensor = args[0]
    if device_of(source) == target and (not dtypes or dtypes[0] == source.dtype):
        return source
    made = source.clone() if not dtypes else source.to(dtypes[0], copy=True)
    return put(made, target)


class _Checks(TorchDispatchMode):
    """Gives results the label of their arguments; raises if these are on several devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        device = _common_device(name, given)
        made = func(*args, **kwargs)
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and not any(leaf is each for each in given) and device is not None:
                put(leaf, device)
        return made


def _common_device(name: str, given: list[Tensor]) -> torch.device | None:
    if not given:
        return None
    first = device_of(given[0])
    if name in ("copy_", "_to_copy"):
        return first
    others = {device_of(each) for each in given if each.dim() or device_of(each) != HOST}
    if name in CROSSING:
        others -= {HOST} - {first}
    if len(others) > 1:
        raise RuntimeError(f"{name}: tensors on {', '.join(sorted(map(str, others)))}")
    return others.pop() if others else first


@contextmanager
def virtual_devices() -> Iterator[None]:
    """Context in which tensors have virtual devices."""
    with _Labels(), _Checks():
        yield


def put_all(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Label the tensors, in place."""
    for tensor in tensors:
        put(tensor, device)
