"""Loader of the compiled kernels, and the instruction set that they use. ctypes releases the GIL while one runs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import POINTER, c_int, c_int64
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import takewhile
from pathlib import Path
from typing import Any

from . import calls
from .call import Call

LEVELS = ("portable", "avx2", "avx512", "avx512bf16")
"""Instruction sets from the least to the most capable; a machine that runs one runs all before it."""

NO_MEMORY = 1
"""Status of a kernel that could not allocate its working memory; 0: done."""

KERNELS: dict[str, type[Call]] = {
    "keysift_paged_attention": calls.AttentionCall,
    "keysift_linear": calls.LinearCall,
    "keysift_layer_in": calls.LayerInCall,
    "keysift_layer_out": calls.LayerOutCall,
    "keysift_column_scores": calls.ScoresCall,
    "keysift_code_masses": calls.PagesCall,
    "keysift_page_bounds": calls.PagesCall,
    "keysift_top_pages": calls.TopCall,
    "keysift_steady_pages": calls.SteadyCall,
    "keysift_cluster": calls.ClusterCall,
    "keysift_probe": calls.ProbeCall,
    "keysift_graph_search": calls.GraphSearchCall,
    "keysift_graph_nearest": calls.GraphNearestCall,
    "keysift_graph_links": calls.GraphLinksCall,
    "keysift_summarize": calls.FillCall,
    "keysift_encode": calls.FillCall,
    "keysift_admit": calls.AdmitCall,
    "keysift_read_pieces": calls.ReadCall,
}
"""Kernels and the structure that each takes, besides the level of the instruction set and the number of threads."""


def _load() -> ctypes.CDLL:
    try:
        return _declare(ctypes.CDLL(os.fspath(path := _path())))
    except OSError as error:
        raise ImportError(f"{path.name} does not load here") from error


def _path() -> Path:
    """File of the library: the one built with the package, or another that the environment names."""
    if other := os.environ.get("KEYSIFT_NATIVE_LIBRARY"):
        return Path(other)
    for suffix in EXTENSION_SUFFIXES:
        if (path := Path(__file__).parent / f"_kernels{suffix}").exists():
            return path
    raise ImportError("keysift's native kernels are not built; install it with a C++17 compiler at hand")


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give every kernel its argument types and its check. Raises `ImportError` for a library of other sources."""
    try:
        library.keysift_layouts.restype = POINTER(c_int64)
        if list(takewhile(bool, library.keysift_layouts())) != calls.layouts():
            raise ImportError("keysift's native kernels have other call structures than calls.py; install it again")
        for name, call in KERNELS.items():
            function = getattr(library, name)
            function.argtypes, function.restype, function.errcheck = (POINTER(call), c_int, c_int), c_int, check_status
    except AttributeError as error:
        raise ImportError(f"keysift's native kernels are of another version; install it again: {error}") from error
    return library


def check_status(status: int, function: Any, _arguments: tuple[Any, ...]) -> int:
    """Raise `MemoryError` for a kernel without working memory, `RuntimeError` for one that failed otherwise."""
    if status == NO_MEMORY:
        raise MemoryError(f"{function.__name__}: no working memory")
    if status:
        raise RuntimeError(f"{function.__name__} failed with status {status}")
    return status


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
    """Make the kernels inside the block use a lower instruction set; `ValueError` if the machine does not run it."""
    if name not in isas():
        raise ValueError(f"this machine runs {', '.join(isas())}, not {name}")
    token = _level.set(LEVELS.index(name))
    try:
        yield
    finally:
        _level.reset(token)


def level() -> int:
    """The number of `isa` in the library."""
    return _level.get()
