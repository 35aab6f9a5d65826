"""Invariants of an engine between two steps."""

from __future__ import annotations

from keysift.engine import Engine
from keysift.kvcache.indexes import SPARE


def audit(engine: Engine) -> None:
    """Every page is free, idle or held, by as many as hold it; every handle belongs to one that runs."""
    cache, scheduler = engine.cache, engine.scheduler
    allocator, prefix = cache.allocator, cache.prefix
    held = [0] * allocator.total
    for frames in cache._frames.values():
        for frame in frames:
            held[frame] += 1
    assert allocator._references == held
    free, idle = allocator._free, set(allocator._idle)
    assert len(set(free)) == len(free)
    assert not idle & set(free)
    assert {*free, *idle} == {frame for frame, count in enumerate(held) if not count}
    assert set(prefix._keys) == set(prefix._notes) == allocator._kept >= idle
    assert {frame: key for key, frame in prefix._frames.items()} == prefix._keys
    handles = [live.handle for live in scheduler.running]
    assert sorted(handles) == sorted(cache._frames)
    assert sorted([*handles, *cache._closed]) == list(range(engine.config.max_num_seqs))
    assert all(live.handle is None for live in scheduler.waiting)
    assert not set(map(id, scheduler.running)) & set(map(id, scheduler.waiting))


def audit_end(engine: Engine) -> None:
    """Nothing is left of requests that have ended, but prefixes and what few indexes know of them."""
    audit(engine)
    assert not engine.has_work
    assert engine.cache.free_pages == engine.cache.allocator.total
    assert not engine.cache._frames
    assert not engine.cache.indexes._named
    assert len(engine.cache.indexes) <= SPARE
    assert engine.cache.recent.bytes == 0
