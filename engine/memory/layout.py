"""Layout of an offloaded KV cache: sizes of the backing store and of the pool, fixed before anything runs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from keysift.kvcache import BackingStore, CacheSpec, HostStore, OffloadError, OffloadTier, PoolSize
from keysift.kvcache.tiers.file_store import FileStore
from keysift.kvcache.tiers.store import EXTENT

from ..config import EngineConfig
from ..errors import InvalidRequest
from .index_memory import left_for_pages

PINNED = "pinned"
SHARE_OF_DISK = 0.8
"""Largest share of the folder's free bytes that the backing store takes by default, without ``kv_offload_memory``."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Pages of the backing store, and sizes of the pool that holds some of them."""

    frames: int
    pool: PoolSize
    store_bytes: int
    pool_bytes: int
    described_bytes: int
    """Bytes of summaries, codes and tables, which are resident for every page."""

    def __str__(self) -> str:
        size = self.pool
        return (
            f"KV: {self.frames:,} pages in the backing store ({_mib(self.store_bytes)}), their summaries and codes in "
            f"memory ({_mib(self.described_bytes)}); a pool of {_mib(self.pool_bytes)}: {size.slots:,} pages of each "
            f"layer and head, {size.staged:,} of one layer for prompts, {size.tails} for open pages"
        )


def lay_out(
    config: EngineConfig, spec: CacheSpec, max_model_len: int, free: float, share: float, host: float | None = None
) -> Layout:
    """A layout that fits into `free` bytes of the device's memory; defaults take `share` of them at most.

    `host`: free bytes of host memory, for a pinned store, where the device has memory of its own.

    Raises:
        InvalidRequest: the configured sizes do not fit or are too small; it names the bytes.
    """
    longest = spec.pages_for(max_model_len)
    room = _store_bytes(config, spec, free, share, host)
    frames = min(_frames(spec, room), longest * config.max_num_seqs)
    if frames < 1:
        raise InvalidRequest("kv_offload_memory", f"at least one page = {spec.kv_bytes} bytes, got {room}")
    given = int(share * free) if config.kv_memory is None else int(config.kv_memory)
    pool = _pool(config, spec, left_for_pages(config, spec, given), longest)
    layout = Layout(frames, pool, frames * spec.kv_bytes, pool.bytes(spec), frames * _described(spec))
    _check_fits(layout, layout.store_bytes if config.kv_offload == PINNED and host is None else 0, free)
    return layout


def _check_fits(layout: Layout, store: int, free: float) -> None:
    """Raises `InvalidRequest` beyond `free` bytes; `store`: bytes of the backing store in the same memory."""
    if layout.described_bytes + layout.pool_bytes + store > free:
        raise InvalidRequest(
            "kv_offload_memory",
            f"{layout.frames} pages need {layout.described_bytes} bytes of memory for their summaries and codes"
            + (f" and {store} for themselves" if store else "")
            + f", the pool (kv_memory) {layout.pool_bytes}; {int(free)} are free",
        )


def make_tier(config: EngineConfig, spec: CacheSpec, layout: Layout, device: torch.device) -> OffloadTier:
    """The tier of an offloaded cache. Raises `InvalidRequest` where the backing store cannot be made."""
    assert config.kv_offload is not None
    store: BackingStore
    try:
        store = HostStore(spec, device) if config.kv_offload == PINNED else FileStore(spec, Path(config.kv_offload))
    except OffloadError as error:
        raise InvalidRequest("kv_offload", f"{config.kv_offload!r}: {error}") from None
    return OffloadTier(spec, layout.frames, store, layout.pool, device)


def _described(spec: CacheSpec) -> int:
    """Resident bytes for each page of the store: summaries, codes, and its slot in every layer's and head's pool."""
    return spec.page_bytes - spec.kv_bytes + 4 * spec.num_layers * spec.num_kv_heads


def _frames(spec: CacheSpec, room: int) -> int:
    """Pages of a store of `room` bytes, which grows by whole extents; only the first extent may exceed the room."""
    pages = room // spec.kv_bytes
    return pages if pages < EXTENT else pages // EXTENT * EXTENT


def _store_bytes(config: EngineConfig, spec: CacheSpec, free: float, share: float, host: float | None) -> int:
    """Bytes of the backing store: as configured, or what its place and the resident memory of its pages allow."""
    resident = _described(spec)
    if config.kv_offload == PINNED:
        place, there = "host memory", int(free if host is None else host)
        allowed = int(share * there)
        resident += spec.kv_bytes if host is None else 0
    else:
        folder = Path(str(config.kv_offload))
        if not folder.is_dir():
            raise InvalidRequest(
                "kv_offload", f"an existing folder, or {PINNED!r} for host memory, got {str(folder)!r}"
            )
        place, there = str(folder), shutil.disk_usage(folder).free
        allowed = int(SHARE_OF_DISK * there)
    if config.kv_offload_memory is None:
        return min(allowed, int(share * free) // resident * spec.kv_bytes)
    if config.kv_offload_memory > there:
        raise InvalidRequest(
            "kv_offload_memory",
            f"at most the {there} bytes that are free in {place}, got {int(config.kv_offload_memory)}",
        )
    return int(config.kv_offload_memory)


def _pool(config: EngineConfig, spec: CacheSpec, given: int, longest: int) -> PoolSize:
    """Split of the pool: at most half for one whole layer of the longest context, the rest for slots of all layers.

    A prompt's chunk and a page of each layer always fit. Raises `InvalidRequest` naming the bytes that are needed.
    """
    layers, page = spec.num_layers, spec.num_kv_heads * spec.read_bytes
    pages, tails = given // page, config.max_num_seqs
    chunk = min(spec.pages_for(config.prefill_chunk) + 1, longest)
    staged = max(min(longest, pages // 2, pages - layers * (1 + tails)), chunk)
    slots = min((pages - staged) // layers - tails, longest * tails)
    if slots < 1:
        needed = (chunk + layers * (1 + tails)) * page
        raise InvalidRequest(
            "kv_memory",
            f"at least {needed} bytes: a prompt's chunk of one layer, and in each of {layers} layers one page and "
            f"{tails} open ones (max_num_seqs), got {given}",
        )
    return PoolSize(slots, staged, tails, config.kv_prefetch)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
