"""Finds and loads the compiled kernels. ctypes lets go of the GIL while one runs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_float, c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

LEVELS = ("portable", "avx2", "avx512", "avx512bf16")
"""Instruction sets from the least to the most capable; a machine that runs one runs all before it."""

NO_MEMORY = 1
"""The status of a kernel that found no room for what it works in; 0: done."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class AttentionCall(ctypes.Structure):
    """Mirrors `AttentionCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "frames", "pages", "starts", "out", "lse")),
        ("q_strides", c_int64 * 2),
        *((f"{name}_strides", c_int64 * 3) for name in ("k", "v", "frames", "pages")),
        *((name, c_int64) for name in ("tokens", "heads", "kv_heads", "lists", "dim", "page_size", "rows")),
        *((name, c_int64) for name in ("pages_per_list", "queries_per_row", "window", "type")),
        ("scale", c_float),
    )


class Matrix(ctypes.Structure):
    """Mirrors `Matrix` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "scales", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs")),
    )


class LinearCall(ctypes.Structure):
    """Mirrors `LinearCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "out")),
        ("matrix", Matrix),
        *((name, c_int64) for name in ("x_stride", "batch", "type")),
    )


class LayerInCall(ctypes.Structure):
    """Mirrors `LayerInCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "norm", "cos", "sin", "q", "k", "v")),
        *((name, Matrix) for name in ("to_q", "to_k", "to_v")),
        *((name, c_int64) for name in ("batch", "dim", "type")),
        ("eps", c_float),
    )


class LayerOutCall(ctypes.Structure):
    """Mirrors `LayerOutCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "attended", "norm", "out")),
        *((name, Matrix) for name in ("to_out", "gate", "up", "down")),
        *((name, c_int64) for name in ("batch", "type")),
        ("eps", c_float),
    )


class ScoresCall(ctypes.Structure):
    """Mirrors `ScoresCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "frames", "positions", "mass", "peak", "bands")),
        ("q_strides", c_int64 * 2),
        *((f"{name}_strides", c_int64 * 3) for name in ("k", "frames")),
        *((name, c_int64) for name in ("probes", "queries_per_probe", "heads", "kv_heads", "dim", "page_size")),
        *((name, c_int64) for name in ("pages", "type")),
        ("scale", c_float),
    )


class PagesCall(ctypes.Structure):
    """Mirrors `PagesCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "own", "summaries", "levels", "bounds", "scales", "frames")),
        *((name, c_void_p) for name in ("positions", "masses")),
        ("q_strides", c_int64 * 2),
        *((f"{name}_strides", c_int64 * 3) for name in ("k", "frames")),
        ("own_strides", c_int64 * 2),
        *((name, c_int64) for name in ("rows", "heads", "kv_heads", "dim", "page_size", "pages", "words")),
        *((name, c_int64) for name in ("candidates", "type")),
        *((name, c_float) for name in ("scale", "slack")),
    )


class TopCall(ctypes.Structure):
    """Mirrors `TopCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("masses", "firsts", "lasts", "out", "kept")),
        *((name, c_int64) for name in ("rows", "heads", "lists", "pages", "width", "sinks", "budget")),
        ("epsilon", c_float),
    )


class SteadyCall(ctypes.Structure):
    """Mirrors `SteadyCall` of abi.h."""

    _fields_ = (
        ("top", TopCall),
        *((name, c_void_p) for name in ("known", "read", "averages", "refused", "now_read", "now_averages")),
        *((name, c_void_p) for name in ("overlap", "bound_exceeded")),
        *((name, c_int64) for name in ("queried", "most", "refusable")),
        *((name, c_float) for name in ("factor", "keep")),
    )


class ClusterCall(ctypes.Structure):
    """Mirrors `ClusterCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("k", "frames", "centroids", "ends", "tokens")),
        *((f"{name}_strides", c_int64 * 3) for name in ("k", "frames")),
        *((name, c_int64) for name in ("segments", "kv_heads", "dim", "page_size", "pages", "lists", "iterations")),
        ("type", c_int64),
    )


class ProbeCall(ctypes.Structure):
    """Mirrors `ProbeCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "frames", "positions", "which", "centroids", "ends", "tokens")),
        *((name, c_void_p) for name in ("keys", "scores", "scanned", "masses")),
        ("q_strides", c_int64 * 2),
        *((f"{name}_strides", c_int64 * 3) for name in ("k", "frames")),
        *((name, c_int64) for name in ("which_stride", "rows", "heads", "kv_heads", "dim", "page_size", "pages")),
        *((name, c_int64) for name in ("width", "segment", "lists", "probes", "top_k", "type")),
        ("scale", c_float),
    )


class GraphSearchCall(ctypes.Structure):
    """Mirrors `GraphSearchCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "frames", "positions", "ends", "hubs", "entries", "links", "points")),
        *((name, c_void_p) for name in ("keys", "scores", "scanned", "masses")),
        ("q_strides", c_int64 * 2),
        *((f"{name}_strides", c_int64 * 3) for name in ("k", "frames")),
        *((name, c_int64) for name in ("rows", "heads", "kv_heads", "dim", "page_size", "pages", "degree")),
        *((name, c_int64) for name in ("beam", "top_k", "sink", "window", "type")),
        ("scale", c_float),
    )


class GraphNearestCall(ctypes.Structure):
    """Mirrors `GraphNearestCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "frames", "nearest")),
        ("k_strides", c_int64 * 3),
        *((name, c_int64) for name in ("kv_heads", "queries", "dim", "page_size", "wanted", "first", "end", "type")),
    )


class GraphLinksCall(ctypes.Structure):
    """Mirrors `GraphLinksCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("nearest", "links")),
        *((name, c_int64) for name in ("kv_heads", "queries", "wanted", "tokens", "degree")),
    )


class FillCall(ctypes.Structure):
    """Mirrors `FillCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("k", "v", "summaries", "levels", "bounds", "scales", "frames")),
        *((f"{name}_strides", c_int64 * 3) for name in ("k", "v", "summaries", "levels", "bounds")),
        ("scales_strides", c_int64 * 2),
        *((name, c_int64) for name in ("filled", "kv_heads", "dim", "page_size", "words", "bits", "type")),
    )


class AdmitCall(ctypes.Structure):
    """Mirrors `AdmitCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("where", "owner", "used", "frames", "pages", "loads", "slots", "found")),
        ("table", c_void_p),
        *((f"{name}_strides", c_int64 * 3) for name in ("frames", "pages")),
        *((name, c_int64) for name in ("count", "capacity", "rows", "kv_heads", "lists", "pages_per_list", "width")),
        *((name, c_int64) for name in ("max_pages", "now", "before")),
    )


class ReadCall(ctypes.Structure):
    """Mirrors `ReadCall` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("pool", "loads", "slots")),
        *((name, c_int64) for name in ("kv_heads", "width", "file", "extent", "extent_bytes", "layer_offset")),
        *((name, c_int64) for name in ("piece_bytes", "error")),
    )


def _load() -> ctypes.CDLL:
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        if (path := folder / f"_kernels{suffix}").exists():
            try:
                return _declare(ctypes.CDLL(os.fspath(path)))
            except OSError as error:
                raise ImportError(f"{path.name} does not load here") from error
    raise ImportError("keysift's native kernels are not built; install it with a C++17 compiler at hand")


def _check(status: int, function: Any, _arguments: tuple[Any, ...]) -> int:
    """Raises `MemoryError` where a kernel found no room for what it works in, `RuntimeError` where it failed."""
    if status == NO_MEMORY:
        raise MemoryError(f"{function.__name__}: no memory for what it works in")
    if status:
        raise RuntimeError(f"{function.__name__} failed with status {status}")
    return status


KERNEL: tuple[tuple[type[Any], ...], type[c_int], Any] = (c_void_p, c_int, c_int), c_int, _check
"""Argument types of every kernel (call, level, threads), the type of its status and what is made of that."""


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for function in (library.keysift_paged_attention, library.keysift_linear, library.keysift_column_scores):
        function.argtypes, function.restype, function.errcheck = KERNEL
    for function in (library.keysift_layer_in, library.keysift_layer_out):
        function.argtypes, function.restype, function.errcheck = KERNEL
    for function in (library.keysift_code_masses, library.keysift_page_bounds, library.keysift_top_pages):
        function.argtypes, function.restype, function.errcheck = KERNEL
    for function in (library.keysift_steady_pages, library.keysift_cluster, library.keysift_probe):
        function.argtypes, function.restype, function.errcheck = KERNEL
    for function in (library.keysift_graph_search, library.keysift_graph_nearest, library.keysift_graph_links):
        function.argtypes, function.restype, function.errcheck = KERNEL
    for function in (library.keysift_summarize, library.keysift_encode):
        function.argtypes, function.restype, function.errcheck = KERNEL
    for function in (library.keysift_admit, library.keysift_read_pieces):
        function.argtypes, function.restype, function.errcheck = KERNEL
    return library


kernels = _load()
_best = int(kernels.keysift_best_level())
_level: ContextVar[int] = ContextVar("keysift_isa_level", default=_best)


def isa() -> str:
    """The instruction set that the kernels use."""
    return LEVELS[_level.get()]


def isas() -> tuple[str, ...]:
    """All instruction sets that this machine runs, the best last."""
    return LEVELS[: _best + 1]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Make the kernels inside the block use a lower instruction set; `ValueError` where the machine does not run it."""
    if name not in isas():
        raise ValueError(f"this machine runs {', '.join(isas())}, not {name}")
    token = _level.set(LEVELS.index(name))
    try:
        yield
    finally:
        _level.reset(token)


def level() -> int:
    """The number that the library knows `isa` by."""
    return _level.get()
