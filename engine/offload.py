"""How much of the KV cache is at hand and how much of it lives elsewhere, decided before anything runs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from keysift.kvcache import CacheSpec, Home, HomeError, MemoryHome, OffloadTier, PoolSize
from keysift.kvcache.home_file import FileHome

from .config import EngineConfig
from .errors import InvalidRequest

PINNED = "pinned"
SHARE_OF_DISK = 0.8
"""Of what is free in the home's folder, the most that it takes unless ``kv_home_memory`` says otherwise."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Pages at home, and what of them is at hand."""

    frames: int
    pool: PoolSize
    home_bytes: int
    pool_bytes: int
    described_bytes: int
    """Of summaries, codes and tables, which are at hand for every page."""

    def __str__(self) -> str:
        size = self.pool
        return (
            f"KV: {self.frames:,} pages at home ({_mib(self.home_bytes)}), their summaries and codes at hand "
            f"({_mib(self.described_bytes)}); a pool of {_mib(self.pool_bytes)}: {size.slots:,} pages of each layer "
            f"and head, {size.staged:,} of one layer for prompts, {size.tails} for open pages"
        )


def lay_out(config: EngineConfig, spec: CacheSpec, max_model_len: int, free: float, share: float) -> Layout:
    """A layout that fits into `free` bytes of memory; defaults take `share` of them at most.

    Raises:
        InvalidRequest: what was asked for does not fit, or is too little to work with; it names the bytes.
    """
    longest = spec.pages_for(max_model_len)
    wanted = longest * config.max_num_seqs
    room = _home_bytes(config, spec, free, share)
    frames = min(room // spec.kv_bytes, wanted)
    if frames < 1:
        raise InvalidRequest("kv_home_memory", f"at least one page = {spec.kv_bytes} bytes, got {room}")
    described = frames * _described(spec)
    given = int(share * free) if config.kv_memory is None else int(config.kv_memory)
    pool = _pool(config, spec, given, longest)
    pool_bytes = pool.bytes(spec)
    if described + pool_bytes > free:
        raise InvalidRequest(
            "kv_home_memory",
            f"{frames} pages need {described} bytes of memory for their summaries and codes, and the pool "
            f"{pool_bytes}; {int(free)} are free",
        )
    return Layout(frames, pool, frames * spec.kv_bytes, pool_bytes, described)


def make_tier(config: EngineConfig, spec: CacheSpec, layout: Layout, device: torch.device) -> OffloadTier:
    """Raises `InvalidRequest` where the home cannot be made."""
    assert config.kv_home is not None
    home: Home
    try:
        home = MemoryHome(spec, device) if config.kv_home == PINNED else FileHome(spec, Path(config.kv_home))
    except HomeError as error:
        raise InvalidRequest("kv_home", str(error)) from None
    return OffloadTier(spec, layout.frames, home, layout.pool, device)


def _described(spec: CacheSpec) -> int:
    """Bytes at hand for each page at home: summaries, codes, and where it is in every layer's and head's pool."""
    return spec.page_bytes - spec.kv_bytes + 4 * spec.num_layers * spec.num_kv_heads


def _home_bytes(config: EngineConfig, spec: CacheSpec, free: float, share: float) -> int:
    room = int(share * free)
    if config.kv_home != PINNED:
        folder = Path(str(config.kv_home))
        if not folder.is_dir():
            raise InvalidRequest(
                "kv_home", f"an existing folder, or {PINNED!r} for host memory, got {config.kv_home!r}"
            )
        disk = shutil.disk_usage(folder).free
        if config.kv_home_memory is not None and config.kv_home_memory > disk:
            raise InvalidRequest(
                "kv_home_memory",
                f"at most the {disk} bytes that are free in {folder}, got {int(config.kv_home_memory)}",
            )
        # By default no more pages than may be described in the memory that there is.
        room = min(int(SHARE_OF_DISK * disk), room // _described(spec) * spec.kv_bytes)
    return room if config.kv_home_memory is None else int(config.kv_home_memory)


def _pool(config: EngineConfig, spec: CacheSpec, given: int, longest: int) -> PoolSize:
    """Half of it at most for one whole layer of the longest context, the rest for the slots of all layers."""
    layers, page = spec.num_layers, spec.num_kv_heads * spec.read_bytes
    pages, tails = given // page, config.max_num_seqs
    chunk = spec.pages_for(config.prefill_chunk) + 1
    staged = max(min(longest, pages // 2), chunk)
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
