"""Checked mode: the tensors and numbers of every native call against what the kernel reads by them.

A kernel trusts its call: sizes, strides, and every number in a tensor that it follows into another one. In checked mode
they are compared first, by the operands that each structure of calls.py declares. Needs no compiled library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import prod
from types import CodeType, MappingProxyType
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Values of the field `type`."""


class OutOfBounds(IndexError):
    """A native call that would read or write outside of its tensors; names call, field, value and limit."""


class _Mode:
    """Of the whole process: the engine's thread and background threads alike."""

    on: bool = os.environ.get("KEYSIFT_CHECKED", "").lower() in ("1", "true", "yes", "on")


mode = _Mode()


def enable() -> None:
    """Check every native call of this process from now on."""
    mode.on = True


@contextmanager
def checked(on: bool = True) -> Iterator[None]:
    """Check every native call inside the block, in all threads; with False none."""
    before, mode.on = mode.on, on
    try:
        yield
    finally:
        mode.on = before


@dataclass(frozen=True, slots=True)
class Operand:
    """Memory that a pointer of a call points to.

    A shape has the lengths of its axes, separated by spaces: expressions of the call's sizes. A name that is no size
    stands for the length of its axis, the same in all operands.
    """

    dtype: str
    """Of torch; `type`: that of the call; `any`; `bytes`: any, and the lengths count bytes."""
    shape: str
    optional: bool = field(default=False, kw_only=True)
    """True if it may be None."""
    strides: int = field(default=0, kw_only=True)
    """Leading axes whose strides the call has; those after them are contiguous."""


@dataclass(frozen=True, slots=True)
class Numbers(Operand):
    """Integers that a kernel follows into other operands."""

    below: str
    """Expression that all of them are less than."""
    least: int = field(default=0, kw_only=True)
    ordered: bool = field(default=False, kw_only=True)
    """True if they ascend along the last axis, but for negative ones at its end."""


@dataclass(frozen=True, slots=True)
class Each:
    """Tensors of one kind, passed as a list of their addresses; None where the shape is empty."""

    operand: Operand
    count: str
    """Length of the list: a size, or a name as in a shape."""
    by: tuple[str, ...] = ()
    """Operands with a number for each of them, for which their names stand in the shape."""


Operands = Mapping[str, Operand | Each]
Scope = dict[str, Any]


def named(**operands: Operand | Each) -> Operands:
    """Operands of a call, in the order of its pointers."""
    return MappingProxyType(operands)


def check(call: Any, values: Mapping[str, Any]) -> None:
    """Raise `OutOfBounds` if `values`, by field name, do not fit a call structure that has its sizes."""
    name = type(call).__name__
    scope: Scope = {size: getattr(call, size) for size in call.sizes}
    for size in call.sizes:
        if isinstance(scope[size], int) and scope[size] < 0 and size not in call.signed:
            raise OutOfBounds(f"{name}.{size}: {scope[size]}, at least 0")
    given = {of: operand for of, operand in call.operands.items() if of in values}
    for of, operand in given.items():
        _each(_fit, call, of, operand, values, scope)
    for rule in call.rules:
        if not _value(rule, scope):
            used = ", ".join(f"{word} is {scope[word]}" for word in _code(rule).co_names if word in scope)
            raise OutOfBounds(f"{name}: not {rule}, where {used}")
    for of, operand in given.items():
        _each(_follow, call, of, operand, values, scope)


def _each(test: Any, call: Any, name: str, operand: Operand | Each, values: Mapping[str, Any], scope: Scope) -> None:
    """Run a test of one operand, or of all tensors of a list."""
    where, value = f"{type(call).__name__}.{name}", values[name]
    if isinstance(operand, Operand):
        test(where, operand, value, scope)
        return
    _bind(where, operand.count, len(value), scope)
    seen = set()
    for i, tensor in enumerate(value):
        own = {by: int(values[by][i]) for by in operand.by}
        if (key := (id(tensor), *own.values())) not in seen:
            seen.add(key)
            test(f"{where}[{i}]", operand.operand, tensor, scope | own)


def _fit(where: str, operand: Operand, tensor: Tensor | None, scope: Scope) -> None:
    """Compare dtype, shape and strides."""
    if tensor is None:
        known = [
            _value(length, scope) for length in _axes(operand.shape) if set(_code(length).co_names) <= scope.keys()
        ]
        if not operand.optional and 0 not in known:
            raise OutOfBounds(f"{where}: None, needs {operand.dtype} [{operand.shape}]")
        return
    _fit_kind(where, operand.dtype, tensor, scope)
    lengths = _lengths(where, operand, tensor, scope) if not operand.strides else list(tensor.shape)
    if len(lengths) != len(_axes(operand.shape)):
        raise OutOfBounds(f"{where}: shape {list(tensor.shape)}, needs [{operand.shape}]")
    for axis, length in zip(_axes(operand.shape), lengths, strict=True):
        _bind(f"{where}: shape {list(tensor.shape)}", axis, length, scope)
    _fit_storage(where, tensor, operand.strides)


def _fit_kind(where: str, dtype: str, tensor: Tensor, scope: Scope) -> None:
    wanted = _dtype(dtype, scope.get("type"))
    if not tensor.is_cpu or wanted not in (None, tensor.dtype):
        raise OutOfBounds(f"{where}: {tensor.dtype} on {tensor.device}, needs {wanted or 'a tensor'} on the CPU")


def _lengths(where: str, operand: Operand, tensor: Tensor, scope: Scope) -> list[int]:
    """Axes of contiguous memory, which may have been viewed in others: at most one of them is not known yet."""
    axes = [None if axis.isidentifier() and axis not in scope else _value(axis, scope) for axis in _axes(operand.shape)]
    known = prod(length for length in axes if length is not None)
    total = tensor.numel() * (tensor.element_size() if operand.dtype == "bytes" else 1)
    free = total // known if known else 0
    lengths = [free if length is None else length for length in axes]
    if prod(lengths) != total:
        raise OutOfBounds(f"{where}: shape {list(tensor.shape)}, needs [{operand.shape}], which is {lengths}")
    return lengths


def _bind(where: str, axis: str, length: int, scope: Scope) -> None:
    """Give a new name a length, or compare it with what it stands for."""
    if axis.isidentifier() and axis not in scope:
        scope[axis] = length
    elif (wanted := _value(axis, scope)) != length:
        raise OutOfBounds(f"{where}: {length}, needs {axis}, which is {wanted}")


def _fit_storage(where: str, tensor: Tensor, axes: int) -> None:
    """Check that the axes after the first `axes` are contiguous, and that no element lies outside of the storage."""
    shape, strides, last = tensor.shape, tensor.stride(), tensor.storage_offset() + tensor.numel() - 1
    if tensor.numel() == 0:
        return
    if not tensor.is_contiguous():
        if not all(shape[i] == 1 or strides[i] == prod(shape[i + 1 :]) for i in range(axes, len(shape))):
            raise OutOfBounds(f"{where}: strides {strides}, needs contiguous axes from {axes} on")
        last = tensor.storage_offset() + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
    if (last + 1) * tensor.element_size() > (room := tensor.untyped_storage().nbytes()):
        raise OutOfBounds(f"{where}: element {last}, its storage has {room} bytes")


def _follow(where: str, operand: Operand, tensor: Tensor | None, scope: Scope) -> None:
    """Compare numbers with the range that they index."""
    if tensor is None or not isinstance(operand, Numbers) or tensor.numel() == 0:
        return
    limit = _value(operand.below, scope)
    numbers = tensor[tuple(slice(1) if step == 0 else slice(None) for step in tensor.stride())]
    least, most = map(int, torch.aminmax(numbers))
    if least < operand.least or most >= limit:
        wrong = least if least < operand.least else most
        raise OutOfBounds(f"{where}: {wrong}, must be from {operand.least} to {limit - 1} (below {operand.below})")
    if operand.ordered:
        ends = numbers.masked_fill(numbers < 0, torch.iinfo(numbers.dtype).max)
        if bool((ends[..., 1:] < ends[..., :-1]).any()):
            raise OutOfBounds(f"{where}: {numbers.tolist()}, must ascend, with negative ones at the end")


@cache
def _dtype(name: str, number: int | None) -> torch.dtype | None:
    """The dtype of an operand, None for any; `number`: the call's."""
    if name == "type":
        return next((dtype for dtype, value in DTYPES.items() if value == number), torch.float32)
    return None if name in ("any", "bytes") else getattr(torch, name)


@cache
def _code(expression: str) -> CodeType:
    return compile(expression, f"<{expression}>", "eval")


def _value(expression: str, scope: Scope) -> int:
    known = scope.get(expression)
    return int(eval(_code(expression), {"__builtins__": {}}, scope)) if known is None else known


@cache
def _axes(shape: str) -> Sequence[str]:
    return tuple(shape.split())
