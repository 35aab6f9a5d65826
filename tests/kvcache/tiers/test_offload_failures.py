"""Offloaded caches when the store fails, is interrupted, or lacks a system call."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from keysift.attention import bind, make
from keysift.kvcache import CacheSpec, HostStore, OffloadError, OffloadTier, PagedCache, Span, Step
from keysift.kvcache.ops import use_backend
from keysift.kvcache.tiers import pool_reader
from keysift.kvcache.tiers.file_store import FileStore
from keysift.kvcache.tiers.store import EXTENT
from tests.tiers import in_file, offloaded, on_device, qkv, run

SPEC = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=16, page_size=4)
RETRIEVAL = make("retrieval", sink=4, window=6, budget=16, epsilon=0.0, dense_below=0)


class Fragile(HostStore):
    """A store whose methods in `fails` raise, having done nothing; `gate` holds back prefetches."""

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec, torch.device("cpu"))
        self.fails: dict[str, BaseException] = {}
        self.gate = threading.Event()
        self.gate.set()

    def _check(self, name: str) -> None:
        if (error := self.fails.get(name)) is not None:
            raise error

    def write(self, layer: int, frames: object, pages: Tensor) -> None:
        self._check("write")
        super().write(layer, frames, pages)  # type: ignore[arg-type]

    def read(self, layer: int, frames: object, pages: Tensor) -> None:
        self._check("read")
        super().read(layer, frames, pages)  # type: ignore[arg-type]

    def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert self.gate.wait(10)
            self._check("prefetch")
        else:
            self._check("fetch")
        super().fetch(layer, pool, loads, slots)


def fragile(*, slots: int = 30, staged: int = 40, prefetch_pages: int = 0) -> tuple[PagedCache, Fragile, OffloadTier]:
    cache = offloaded(Fragile, slots=slots, staged=staged, prefetch_pages=prefetch_pages)(SPEC)
    assert isinstance(cache.tier, OffloadTier)
    assert isinstance(cache.tier.pages.store, Fragile)
    return cache, cache.tier.pages.store, cache.tier


def begin(cache: PagedCache, length: int) -> int:
    sequence = cache.open()
    cache.reserve(sequence, length + 40)
    forward(cache, cache.prefill(Span(sequence, 0, length), 8))
    return sequence


def forward(cache: PagedCache, step: Step, text: int = 0) -> Tensor:
    """[L, T, Hq, D], of all layers."""
    attend = bind(RETRIEVAL, cache, step)
    return torch.stack([attend(layer, *qkv(SPEC, text, step.spans[0], layer)) for layer in range(SPEC.num_layers)])


def pair(length: int, stop: int, slots: int = 30) -> tuple[PagedCache, Fragile, PagedCache]:
    """An offloaded cache with its store, and one on the device, both after a prompt that was rolled back."""
    cache, store, _ = fragile(slots=slots)
    twin = on_device(SPEC)
    for one in (cache, twin):
        assert begin(one, length) == 0
        one.rollback(0, stop)
        one.reserve(0, length + 40)
    return cache, store, twin


def test_a_page_that_could_not_be_reopened_is_not_open() -> None:
    cache, store, twin = pair(50, 22)
    step, store.fails = cache.decode([Span(0, 22, 1)]), {"read": OffloadError("broken")}
    with pytest.raises(OffloadError, match="broken"):
        forward(cache, step)
    store.fails = {}
    assert torch.equal(forward(cache, step), forward(twin, twin.decode([Span(0, 22, 1)])))


def test_a_chunk_that_could_not_be_written_leaves_its_first_page_open() -> None:
    cache, store, twin = pair(50, 50)
    step, store.fails = cache.prefill(Span(0, 50, 20), 8), {"write": OffloadError("broken")}
    with pytest.raises(OffloadError, match="broken"):
        forward(cache, step)
    store.fails = {}
    assert torch.equal(forward(cache, step), forward(twin, twin.prefill(Span(0, 50, 20), 8)))


@pytest.mark.parametrize("error", [OffloadError("broken"), KeyboardInterrupt()], ids=["store", "interrupt"])
@pytest.mark.parametrize(("slots", "name"), [(30, "fetch"), (0, "read")])
def test_pages_whose_read_failed_are_read_again(slots: int, name: str, error: BaseException) -> None:
    cache, store, twin = pair(50, 50, slots)
    step, before, store.fails = cache.decode([Span(0, 50, 1)]), cache.tier.traffic, {name: error}
    with pytest.raises(type(error)):
        forward(cache, step)
    assert cache.tier.traffic == before, "nothing has moved"
    store.fails = {}
    assert torch.equal(forward(cache, step), forward(twin, twin.decode([Span(0, 50, 1)])))


def test_a_step_that_runs_again_has_the_whole_pool() -> None:
    """8 slots hold the reads of one run, not those of two that select other pages; the stage holds neither."""
    cache, store, _ = fragile(slots=8, staged=5, prefetch_pages=4)
    twin = on_device(SPEC)
    for one in (cache, twin):
        one.reserve(one.open(), 100)
        for start in range(0, 88, 8):
            forward(one, one.prefill(Span(0, start, 8), 8))
    store.fails = {"read": OffloadError("the stage is not used")}
    step, same = (one.decode([Span(0, 88, 1)]) for one in (cache, twin))
    for text in (0, 1, 2, 3, 0):
        torch.testing.assert_close(forward(cache, step, text), forward(twin, same, text))


def test_prefetches_that_failed_are_not_counted() -> None:
    cache, store, tier = fragile(prefetch_pages=4)
    begin(cache, 90)
    store.fails = {"prefetch": OffloadError("broken")}
    for i in range(6):
        forward(cache, cache.decode([Span(0, 90 + i, 1)]))
    tier._pool_reader.prefetcher.wait(0)
    tier._pool_reader.prefetcher.wait(1)
    assert tier.traffic.prefetched == tier.traffic.prefetch_hits == 0
    store.fails = {}
    forward(cache, cache.decode([Span(0, 96, 1)]))
    assert tier.traffic.prefetched > 0


def test_a_bug_in_a_prefetch_is_raised() -> None:
    """Not an error of the store: the next write of the layer raises it, and no page of the prefetch is resident."""
    cache, store, tier = fragile(prefetch_pages=4)
    begin(cache, 90)
    store.fails = {"prefetch": ZeroDivisionError("a bug")}
    forward(cache, cache.decode([Span(0, 90, 1)]))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        forward(cache, cache.decode([Span(0, 91, 1)]))
    used = tier._pool_reader.pool.residents(0).used
    assert not ((used % 2 == 1) & (used > 0)).any()


def test_the_clock_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_reader, "LATEST", 12)
    wanted = run(on_device(SPEC), RETRIEVAL, (90, 37), 32, 8, new=40)
    cache = offloaded(Fragile, slots=24, staged=40, prefetch_pages=4)(SPEC)
    found = run(cache, RETRIEVAL, (90, 37), 32, 8, new=40)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert isinstance(cache.tier, OffloadTier)
    assert cache.tier._pool_reader._clock <= 12
    assert cache.tier._pool_reader.pool.residents(0).used.max() <= 13


def test_closing_waits_for_a_prefetch() -> None:
    """And may be repeated."""
    cache, store, tier = fragile(prefetch_pages=4)
    begin(cache, 90)
    store.gate.clear()
    forward(cache, cache.decode([Span(0, 90, 1)]))
    closing = threading.Thread(target=tier.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    assert store._extents
    store.gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert not store._extents
    tier.close()


def test_a_cache_may_be_dropped_while_a_prefetch_runs() -> None:
    cache, store, tier = fragile(prefetch_pages=4)
    begin(cache, 90)
    store.gate.clear()
    forward(cache, cache.decode([Span(0, 90, 1)]))
    gone, closed, gate = weakref.ref(tier), tier.close, store.gate
    workers = tier._pool_reader.prefetcher._worker._threads  # type: ignore[attr-defined]
    del cache, store, tier
    gate.set()
    for worker in list(workers):
        gc.collect()
        worker.join(10)
    gc.collect()
    assert gone() is None
    assert not closed.alive


@pytest.mark.parametrize("how", ["missing", errno.EOPNOTSUPP, errno.EINVAL])
def test_files_whose_blocks_cannot_be_reserved_grow(
    how: str | int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(how, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    if how == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
        monkeypatch.delattr(os, "posix_fadvise")
    store = FileStore(SPEC, tmp_path)
    store.claim([EXTENT])
    store.claim([0])
    assert os.fstat(store.fileno()).st_size == 2 * EXTENT * SPEC.kv_bytes
    store.close()
    wanted = run(on_device(SPEC), RETRIEVAL, (90,), 30, 8, new=8)
    found = run(offloaded(in_file(tmp_path), slots=24, staged=40)(SPEC), RETRIEVAL, (90,), 30, 8, new=8)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_a_full_disk_is_an_error_when_blocks_are_reserved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = FileStore(SPEC, tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(
        OffloadError, match=r"kv_offload: .* extended by \d+ bytes: No space left .* bytes free there"
    ) as caught:
        store.claim([0])
    assert caught.value.exhausted
    store.close()


def test_short_reads_and_writes_are_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: read(fd, [parts[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, part, at: write(fd, part[:100], at))
    store = FileStore(SPEC, tmp_path)
    store.claim([0, 1])
    pages = torch.randn(2, 2, 2, 4, 16)
    store.write(1, [0, 1], pages)
    back, pool = torch.empty_like(pages), torch.empty_like(pages)
    store.read(1, [0, 1], back)
    with use_backend("reference"):
        loads = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
        store.fetch(1, pool, loads, loads)
    assert torch.equal(back, pages)
    assert torch.equal(pool, pages)
    store.close()
