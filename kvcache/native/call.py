"""Base of the call structures: filled by field name, and checked where that is on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from .checks import Each, Operand, Operands, check, mode

Fields = Sequence[tuple[str, type[Any]]]


class Call(ctypes.Structure):
    """A structure that `pack` fills by name, except for strides: those of the tensor of that name.

    A pointer is a tensor or None, whose strides are 0; a list of pointers is one of tensors, each of them or None. The
    caller keeps tensors alive until the kernel returns. `pack` raises `TypeError` for a field that is missing or
    unknown and, in checked mode, `OutOfBounds` where the kernel would leave its tensors.
    """

    pack: ClassVar[Callable[..., Any]]
    operands: ClassVar[Operands]
    rules: ClassVar[tuple[str, ...]] = ()
    """Expressions of sizes that hold, so that nothing else is divided by zero, or read past its end."""
    signed: ClassVar[tuple[str, ...]] = ()
    """Sizes that may be negative."""
    sizes: ClassVar[tuple[str, ...]]
    """Fields that are numbers or structures, which shapes and rules name."""

    def __init_subclass__(cls) -> None:
        cls.pack = staticmethod(_make_pack(cls))
        cls.sizes = tuple(field[0] for field in cls._fields_ if field[1] is c_int64 or issubclass(field[1], Call))


def _make_pack(kind: type[Call]) -> Callable[..., Any]:
    """A function with a keyword for each field, generated so that it is as fast as a call by position."""
    names = [field[0] for field in kind._fields_ if not field[0].endswith("_strides")]
    values = ", ".join(_value_of(field[0], field[1]) for field in kind._fields_)
    given = ", ".join(f"{name!r}: {name}" for name in names)
    scope: dict[str, Any] = {"kind": kind, "Tensor": Tensor, "addresses": _addresses, "check": check, "mode": mode}
    source = f"call = kind({values})\n  if mode.on: check(call, {{{given}}})\n  return call"
    exec(f"def pack(*, {', '.join(names)}):\n  {source}", scope)
    return scope["pack"]  # type: ignore[no-any-return]


def _value_of(name: str, kind: Any) -> str:
    """The source of one field's value."""
    if name.endswith("_strides"):
        tensor, axes = name.removesuffix("_strides"), kind._length_
        return f"{tensor}.stride()[:{axes}] if {tensor} is not None else {(0,) * axes}"
    if kind is POINTER(c_void_p):
        return f"addresses({name})"
    return f"{name}.data_ptr() if {name} is not None else None" if kind is c_void_p else name


def _addresses(tensors: Sequence[Tensor | None]) -> Any:
    """An array that a field which points to it keeps alive."""
    return (c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def layout(
    operands: Operands,
    sizes: str,
    floats: str = "",
    *,
    parts: Mapping[str, type[Call]] = MappingProxyType({}),
    strides: Sequence[str] | None = None,
) -> Fields:
    """Fields in the order of abi.h: pointers, other structures, strides, sizes, floats.

    `strides` names the operands that have some, where their order is not that of their pointers.
    """
    kinds = ((name, POINTER(c_void_p) if isinstance(of, Each) else c_void_p) for name, of in operands.items())
    axes = {name: of.strides for name, of in operands.items() if isinstance(of, Operand) and of.strides}
    return (
        *kinds,
        *parts.items(),
        *((f"{name}_strides", c_int64 * axes[name]) for name in strides or axes),
        *((name, c_int64) for name in sizes.split()),
        *((name, c_float) for name in floats.split()),
    )
