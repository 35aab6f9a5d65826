"""Kernels that find no memory say so and leave the process alive: in the caller's thread, in others, and with few."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

library = pytest.importorskip("keysift.kvcache.native.library", exc_type=ImportError)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")

ROOM = 2**24
"""Bytes that a call may still take: enough for what it returns, too little for working memory."""
LIMITED = """
import resource
from pathlib import Path

def limited(call, room):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, before[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
"""
WITH_TORCH = """
import sys
import torch
from keysift.attention.ops.paged_attention.native import paged_attention
from keysift.attention.ops.top_pages.native import top_pages
from keysift.kvcache.index.graph.native import search_graphs
from keysift.kvcache.index.graph.ops import Reach

torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
ROWS, HEADS = 2, 8


def attend(pages):
    rows = 1024 if pages > 512 else 2  # the partial results of long rows, all in the caller's thread
    q, k = torch.randn(rows, HEADS, 64), torch.randn(1, HEADS, 16, 64)
    table = torch.zeros(1, 1, 1, dtype=torch.int32).expand(rows, HEADS, pages)
    chosen = torch.arange(pages, dtype=torch.int32).expand(rows, HEADS, pages)
    starts = torch.full((rows,), 16 * pages - 1, dtype=torch.int32)
    return lambda: paged_attention(q, k, k, table, chosen, starts, queries_per_row=1, scale=0.1)[0]


def choose(pages):
    masses = torch.randn(ROWS, HEADS, pages)
    lasts = torch.full((ROWS,), pages - 1, dtype=torch.int32)
    options = {"heads": 2, "sinks": 1, "window": 1, "budget": 8, "epsilon": 0.0}
    return lambda: top_pages(masses, lasts, lasts, **options).pages


def walk(pages):
    q, k = torch.randn(ROWS, HEADS, 16), torch.randn(1, 1, 16, 16)
    table = torch.zeros(1, 1, 1, dtype=torch.int32).expand(ROWS, 1, pages)
    positions = torch.full((ROWS,), 16 * pages - 1, dtype=torch.int32)
    reach = Reach(32, 128, 100, 0, 16 * pages)  # everything is scanned
    return lambda: search_graphs(q, k, table, positions, [None] * ROWS, reach, 0.1).masses


make, most = {"attend": (attend, 8192), "choose": (choose, 2**22), "walk": (walk, 2**17)}[sys.argv[1]]
small, large = make(64), make(most)
before = small()  # with all threads
try:
    limited(large, int(sys.argv[3]))
except MemoryError as error:
    print("no memory:", error)
assert torch.equal(small(), before)
print("alive")
"""
WITHOUT_TORCH = """
import ctypes, sys

class TopCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("masses", "firsts", "lasts", "out", "kept")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "lists", "pages", "width", "sinks", "budget")),
        ("epsilon", ctypes.c_float),
    )

library = ctypes.CDLL(sys.argv[1])
ROWS = 32


def choose(pages):
    # Of each row one page by its weight, and the last.
    masses = (ctypes.c_float * (ROWS * pages))()
    for row in range(ROWS):
        masses[row * pages + row] = 9.0
    lasts = (ctypes.c_int32 * ROWS)(*[pages - 1] * ROWS)
    out, kept = (ctypes.c_int32 * (2 * ROWS))(), (ctypes.c_float * ROWS)()
    call = TopCall(*map(ctypes.addressof, (masses, lasts, lasts, out, kept)), ROWS, 1, 1, pages, 2, 0, 1, 0.0)
    call.memory = masses, lasts, kept
    return lambda: (library.keysift_top_pages(ctypes.byref(call), 0, 8), out[0::2], set(out[1::2]))


small = choose(64)
print(*limited(small, 2**21))  # no room for the stack of a single thread
print(limited(choose(2**20), 2**21)[0])
print(*small())
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED + script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "name"), [("attend", "paged_attention"), ("choose", "top_pages"), ("walk", "graph_search")]
)
def test_want_of_memory_is_an_error_and_not_the_end(kernel: str, name: str, threads: int) -> None:
    assert run(WITH_TORCH, kernel, str(threads), str(ROOM)) == (
        f"no memory: keysift_{name}: no working memory\nalive\n"
    )


def test_without_room_for_threads_the_caller_works_alone() -> None:
    path = next(Path(library.__file__).parent.glob("_kernels*.so"))
    right = f"0 {list(range(32))} {{63}}"
    assert run(WITHOUT_TORCH, str(path)).splitlines() == [right, "1", right]


def test_every_kernel_tells_its_status() -> None:
    source = (Path(library.__file__).parent / "dispatch.cpp").read_text()
    exported = {name: kind for kind, name in re.findall(r"^KEYSIFT_EXPORT (\w+) (keysift_\w+)\(", source, re.MULTILINE)}
    assert len(exported) > 10
    assert set(exported.values()) == {"int"}
    assert exported.keys() - {"keysift_best_level"} == library.KERNELS.keys()
    for name in library.KERNELS:
        function = getattr(library.kernels, name)
        assert function.errcheck is library.check_status, name
        with pytest.raises(MemoryError, match=name):
            function.errcheck(library.NO_MEMORY, function, ())
