"""Call structures of the native library: ctypes mirrors of abi.h, filled by field name."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import Any, ClassVar

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Values of the field `type`."""

Fields = Sequence[tuple[str, type[Any]]]


class Call(ctypes.Structure):
    """A structure that `pack` fills by name, except for strides: those of the tensor of that name.

    A pointer is a tensor, an address or None, whose strides are 0; the caller keeps tensors alive until the kernel
    returns. `pack` raises `TypeError` for a field that is missing or unknown.
    """

    pack: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        cls.pack = staticmethod(_make_pack(cls))


def _make_pack(kind: type[Call]) -> Callable[..., Any]:
    """A function with a keyword for each field, generated so that it is as fast as a call by position."""
    fields = [(field[0], field[1]) for field in kind._fields_]
    names = ", ".join(name for name, _ in fields if not name.endswith("_strides"))
    values = ", ".join(_value_of(name, of) for name, of in fields)
    scope: dict[str, Any] = {"kind": kind, "Tensor": Tensor}
    exec(f"def pack(*, {names}): return kind({values})", scope)
    return scope["pack"]  # type: ignore[no-any-return]


def _value_of(name: str, kind: Any) -> str:
    """The source of one field's value."""
    if name.endswith("_strides"):
        tensor, axes = name.removesuffix("_strides"), kind._length_
        return f"{tensor}.stride()[:{axes}] if {tensor} is not None else {(0,) * axes}"
    return f"{name}.data_ptr() if isinstance({name}, Tensor) else {name}" if kind is c_void_p else name


def _fields(kind: type[Any], names: str) -> Fields:
    return [(name, kind) for name in names.split()]


def _pointers(names: str) -> Fields:
    return _fields(c_void_p, names)


def _sizes(names: str) -> Fields:
    return _fields(c_int64, names)


def _strides(axes: int, names: str) -> Fields:
    """Strides of the first axes of tensors, in elements."""
    return [(f"{name}_strides", c_int64 * axes) for name in names.split()]


class AttentionCall(Call):
    _fields_ = (
        *_pointers("q k v frames pages starts out lse"),
        *_strides(2, "q"),
        *_strides(3, "k v frames pages"),
        *_sizes("tokens heads kv_heads lists dim page_size rows pages_per_list queries_per_row window type"),
        ("scale", c_float),
    )


class Matrix(Call):
    """Weights of one linear layer; not a call, but a part of some."""

    _fields_ = (*_pointers("weight scales bias"), *_sizes("outputs inputs"))


class LinearCall(Call):
    _fields_ = (*_pointers("x out"), ("matrix", Matrix), *_sizes("x_stride batch type"))


class LayerInCall(Call):
    _fields_ = (
        *_pointers("x norm cos sin q k v"),
        *_fields(Matrix, "to_q to_k to_v"),
        *_sizes("batch dim type"),
        ("eps", c_float),
    )


class LayerOutCall(Call):
    _fields_ = (
        *_pointers("x attended norm out"),
        *_fields(Matrix, "to_out gate up down"),
        *_sizes("batch type"),
        ("eps", c_float),
    )


class ScoresCall(Call):
    _fields_ = (
        *_pointers("q k frames positions mass peak bands"),
        *_strides(2, "q"),
        *_strides(3, "k frames"),
        *_sizes("probes queries_per_probe heads kv_heads dim page_size pages type"),
        ("scale", c_float),
    )


class PagesCall(Call):
    _fields_ = (
        *_pointers("q k own summaries levels bounds scales frames positions masses"),
        *_strides(2, "q"),
        *_strides(3, "k frames"),
        *_strides(2, "own"),
        *_sizes("rows heads kv_heads dim page_size pages words candidates type"),
        *_fields(c_float, "scale slack"),
    )


class TopCall(Call):
    _fields_ = (
        *_pointers("masses firsts lasts out kept"),
        *_sizes("rows heads lists pages width sinks budget"),
        ("epsilon", c_float),
    )


class SteadyCall(Call):
    _fields_ = (
        ("top", TopCall),
        *_pointers("known read averages refused now_read now_averages overlap bound_exceeded"),
        *_sizes("queried most refusable"),
        *_fields(c_float, "factor keep"),
    )


class ClusterCall(Call):
    _fields_ = (
        *_pointers("k frames centroids ends tokens"),
        *_strides(3, "k frames"),
        *_sizes("segments kv_heads dim page_size pages lists iterations type"),
    )


class ProbeCall(Call):
    _fields_ = (
        *_pointers("q k frames positions places centroids ends tokens masses"),
        *_strides(2, "q"),
        *_strides(3, "k frames"),
        *_sizes("places_stride rows heads kv_heads dim page_size pages width segment lists probes type"),
        ("scale", c_float),
    )


class GraphSearchCall(Call):
    _fields_ = (
        *_pointers("q k frames positions ends hubs entries links points keys scores scanned masses"),
        *_strides(2, "q"),
        *_strides(3, "k frames"),
        *_sizes("rows heads kv_heads dim page_size pages degree beam top_k sink window type"),
        ("scale", c_float),
    )


class GraphNearestCall(Call):
    _fields_ = (
        *_pointers("q k frames nearest"),
        *_strides(3, "k"),
        *_sizes("kv_heads queries dim page_size wanted first end type"),
    )


class GraphLinksCall(Call):
    _fields_ = (*_pointers("nearest links"), *_sizes("kv_heads queries wanted tokens degree"))


class FillCall(Call):
    _fields_ = (
        *_pointers("k v summaries levels bounds scales frames"),
        *_strides(3, "k v summaries levels bounds"),
        *_strides(2, "scales"),
        *_sizes("filled kv_heads dim page_size words bits type"),
    )


class AdmitCall(Call):
    _fields_ = (
        *_pointers("where owner used frames pages loads slots found table"),
        *_strides(3, "frames pages"),
        *_sizes("count capacity rows kv_heads lists pages_per_list width max_pages now before"),
    )


class ReadCall(Call):
    _fields_ = (
        *_pointers("pool loads slots"),
        *_sizes("kv_heads width file extent extent_bytes layer_offset piece_bytes error"),
    )


STRUCTURES: tuple[type[Call], ...] = (
    *(AttentionCall, Matrix, LinearCall, LayerInCall, LayerOutCall, ScoresCall, PagesCall, TopCall, SteadyCall),
    *(ClusterCall, ProbeCall, GraphSearchCall, GraphNearestCall, GraphLinksCall, FillCall, AdmitCall, ReadCall),
)
"""In the order of abi.h."""


def layouts() -> list[int]:
    """Size, and offset of the last field, of each structure, in the form of `keysift_layouts`."""
    return [
        number for kind in STRUCTURES for number in (ctypes.sizeof(kind), getattr(kind, kind._fields_[-1][0]).offset)
    ]
