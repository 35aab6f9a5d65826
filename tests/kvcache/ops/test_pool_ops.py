"""The ops of a bounded pool: `admit` against a dictionary, `fetch` and `read_pieces` against copies by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keysift.kvcache import CacheSpec, HostStore
from keysift.kvcache.ops import use_backend
from keysift.kvcache.ops.admit import Admitted, Residents, admit
from keysift.kvcache.ops.dispatch import Backend
from keysift.kvcache.tiers.file_store import FileStore
from keysift.kvcache.tiers.store import EXTENT

FRAMES, HEADS = 40, 2
BACKENDS: list[Backend] = ["reference", "native"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADMITTERS = [*BACKENDS, pytest.param("triton", marks=pytest.mark.skipif(not find_spec("triton"), reason="no Triton"))]


@contextmanager
def admitting(backend: Backend) -> Iterator[str]:
    """Inside, `admit` runs on this backend, Triton's in programs of few frames; yields the device."""
    with pytest.MonkeyPatch.context() as patch, use_backend(backend):
        if backend == "triton":
            patch.setattr("keysift.kvcache.ops.admit.triton.BLOCK", 16)
        yield DEVICE if backend == "triton" else "cpu"


class Oracle:
    """One KV head's pool by the rule: resident pages stay, others take the place read longest ago."""

    def __init__(self, capacity: int) -> None:
        self.slots: list[int | None] = [None] * capacity
        self.read = [-1] * capacity

    def admit(self, wanted: set[int], now: int, before: int) -> tuple[dict[int, int], tuple[int, int, int]]:
        there = [slot for slot, frame in enumerate(self.slots) if frame in wanted]
        found = len(there), sum(self.read[slot] % 2 == 1 for slot in there), len(wanted) - len(there)
        if now % 2 == 0:
            for slot in there:
                self.read[slot] = now
        missing = sorted(wanted - {frame for frame in self.slots if frame is not None})
        free = sorted((when, slot) for slot, when in enumerate(self.read) if when < before)
        loads = {}
        for frame, (_, slot) in zip(missing, free, strict=False):
            self.slots[slot], self.read[slot] = frame, now
            loads[frame] = slot
        return loads, found


def empty(capacity: int, device: str) -> Residents:
    where = torch.full((HEADS, FRAMES), -1, dtype=torch.int32, device=device)
    owner, used = torch.full((2, HEADS, capacity), -1, dtype=torch.int32, device=device)
    return Residents(where, owner, used)


Ask = tuple[bool, list[list[list[int]]]]
pages = st.lists(st.integers(0, 9), max_size=6, unique=True).map(sorted)
accesses = st.lists(st.tuples(st.booleans(), st.lists(st.lists(pages, min_size=4, max_size=4), min_size=2, max_size=2)))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(capacity=st.integers(1, 30), steps=accesses, grouped=st.booleans())
def test_the_pool_holds_what_the_rule_says(backend: Backend, capacity: int, steps: list[Ask], grouped: bool) -> None:
    """Two rows of two sequences that share five frames, lists for each KV head or for each of two query heads."""
    with admitting(backend) as device:
        follow(empty(capacity, device), steps, lists=4 if grouped else 2)


@pytest.mark.skipif(not find_spec("triton"), reason="no Triton")
@settings(deadline=None, max_examples=30)
@given(capacity=st.integers(1, 30), steps=accesses, grouped=st.booleans())
def test_a_gpus_pool_does_too(capacity: int, steps: list[Ask], grouped: bool) -> None:
    """As above, where frames and lists are several programs'."""
    with admitting("triton") as device:
        follow(empty(capacity, device), steps, lists=4 if grouped else 2)


def follow(residents: Residents, steps: list[Ask], lists: int) -> None:
    """Ask a pool and its oracles for the same pages."""
    oracles = [Oracle(residents.owner.shape[1]) for _ in range(HEADS)]
    frames = torch.tensor([[*range(10)], [*range(5, 10), *range(15, 18), *range(38, 40)]], dtype=torch.int32)
    table = frames.to(residents.where.device)[:, None].expand(-1, HEADS, -1)
    for clock, (prefetching, rows) in enumerate(steps, 1):
        now, before = (2 * clock - 1, 2 * clock - 2) if prefetching else (2 * clock, 2 * clock)
        chosen = torch.full((2, lists, 7), -1, dtype=torch.int32)
        for row in range(2):
            for i in range(lists):
                chosen[row, i, : len(rows[row][i])] = torch.tensor(rows[row][i], dtype=torch.int32)
        admitted = admit(table, chosen.to(table.device), residents, now=now, before=before)
        for head, oracle in enumerate(oracles):
            mine = range(head * lists // 2, (head + 1) * lists // 2)
            wanted = {int(table[row, head, page]) for row in range(2) for i in mine for page in rows[row][i]}
            loads, found = oracle.admit(wanted, now, before)
            assert loaded(admitted, head) == loads
            assert tuple(admitted.found[head].tolist()) == found
            check_tables(residents, admitted, table, chosen, head, oracle, list(mine))


def loaded(admitted: Admitted, head: int) -> dict[int, int]:
    pairs = zip(admitted.loads[head].tolist(), admitted.slots[head].tolist(), strict=True)
    return {frame: slot for frame, slot in pairs if frame >= 0}


def check_tables(
    residents: Residents, admitted: Admitted, table: Tensor, chosen: Tensor, head: int, oracle: Oracle, lists: list[int]
) -> None:
    assert [frame if frame >= 0 else None for frame in residents.owner[head].tolist()] == oracle.slots
    assert residents.used[head].tolist() == oracle.read
    there = {frame: slot for slot, frame in enumerate(oracle.slots) if frame is not None}
    assert residents.where[head].tolist() == [there.get(frame, -1) for frame in range(FRAMES)]
    assert admitted.table.min() >= 0
    for row in range(chosen.shape[0]):
        for page in chosen[row, lists].flatten().tolist():
            frame = int(table[row, head, page])
            if page >= 0 and frame in there:
                assert admitted.table[row, head, page] == there[frame]


@pytest.mark.parametrize("backend", ADMITTERS)
def test_slots_of_open_pages_are_never_taken(backend: Backend) -> None:
    with admitting(backend) as device:
        residents = empty(3, device)
        residents.where[:, 7] = 3  # a tail slot after the three slots
        table = torch.arange(10, dtype=torch.int32, device=device)[None, None].expand(1, HEADS, -1)
        chosen = torch.tensor([2, 7, -1], dtype=torch.int32, device=device)[None, None].expand(1, HEADS, -1)
        admitted = admit(table, chosen, residents, now=2, before=2)
    assert admitted.loads.tolist() == [[2, -1, -1]] * HEADS
    assert admitted.table[0, :, 7].tolist() == [3, 3]
    assert residents.where[:, 7].tolist() == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["memory", "file", "triton"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_homes_give_back_what_they_got(backend: Backend, where: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whole pages in runs that cross extents, and single heads into a pool."""
    if where == "triton":
        pytest.importorskip("triton")
    device = torch.device("cuda" if where == "triton" and torch.cuda.is_available() else "cpu")
    spec = CacheSpec(num_layers=2, num_kv_heads=3, head_dim=8, page_size=4, dtype=dtype)
    backing = FileStore(spec, tmp_path) if where == "file" else HostStore(spec, device)
    count = 2 * EXTENT + 3
    backing.claim(range(count))
    written = torch.randn(2, count, 3, 2, 4, 8).to(dtype)
    order = torch.cat([torch.arange(EXTENT - 2, count), torch.arange(EXTENT - 2)])
    for layer in range(2):
        backing.write(layer, order.tolist(), written[layer][order])
    some = [0, 5, EXTENT - 1, EXTENT, EXTENT + 1, count - 1]
    read = torch.full((len(some), 3, 2, 4, 8), torch.nan, dtype=dtype, device=device)
    backing.read(1, some, read)
    assert torch.equal(read.cpu(), written[1, some])
    pool = torch.full((4, 3, 2, 4, 8), torch.nan, dtype=dtype, device=device)
    loads = torch.tensor([[5, EXTENT, -1], [-1, -1, -1], [1, 5, count - 1]], dtype=torch.int32)
    slots = torch.tensor([[3, 0, -1], [-1, -1, -1], [1, 3, 2]], dtype=torch.int32)
    with use_backend("triton" if where == "triton" else backend):
        backing.fetch(1, pool, loads.to(device), slots.to(device))
    for head, row in enumerate(loads.tolist()):
        for frame, slot in zip(row, slots[head].tolist(), strict=True):
            if frame >= 0:
                assert torch.equal(pool[slot, head].cpu(), written[1, frame, head])
    assert pool.isnan().sum() == (12 - 5) * 64
    backing.close()
