"""Caches over every kind of tier, and a driver that runs prompts and tokens through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from keysift.attention import Strategy, bind
from keysift.kvcache import BackingStore, CacheSpec, HostStore, OffloadTier, PagedCache, PoolSize, Span
from keysift.kvcache.tiers.file_store import FileStore

FRAMES, SEQUENCES, MAX_LEN = 160, 4, 400

Make = Callable[[CacheSpec], PagedCache]


def on_device(spec: CacheSpec) -> PagedCache:
    return PagedCache(spec, FRAMES, max_sequences=SEQUENCES, max_len=MAX_LEN)


def offloaded(store: Callable[[CacheSpec], BackingStore], *, slots: int, staged: int, prefetch_pages: int = 0) -> Make:
    """A maker of offloaded caches, whose pool and stage are full of NaN at first."""

    def make(spec: CacheSpec) -> PagedCache:
        size = PoolSize(slots, staged, SEQUENCES, prefetch_pages)
        tier = OffloadTier(spec, FRAMES, store(spec), size, torch.device("cpu"))
        for pages in (tier._pool_reader.pool.pages, tier._stage_reader.stage.pages):
            pages.fill_(torch.nan)
        return PagedCache(spec, FRAMES, max_sequences=SEQUENCES, max_len=MAX_LEN, tier=tier)

    return make


def in_memory(spec: CacheSpec) -> BackingStore:
    return HostStore(spec, torch.device("cpu"))


def in_file(folder: Path) -> Callable[[CacheSpec], BackingStore]:
    return lambda spec: FileStore(spec, folder)


def run(cache: PagedCache, strategy: Strategy, lengths: Sequence[int], chunk: int, row: int, new: int) -> list[Tensor]:
    """Attention of prompts of these lengths in chunks, then of `new` tokens of all together: by step and layer.

    Queries, keys and values depend on the sequence, token and layer alone.
    """
    outs = []
    sequences = [open_for(cache, strategy) for _ in lengths]
    for number, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        cache.reserve(sequence, length)
        for start in range(0, length, chunk):
            span = Span(sequence, start, min(chunk, length - start))
            step = cache.prefill(span, row, length - span.stop)
            attend = bind(strategy, cache, step)
            outs += [attend(layer, *qkv(cache.spec, number, span, layer)) for layer in range(cache.spec.num_layers)]
    for i in range(new):
        spans = [Span(sequence, length + i, 1) for sequence, length in zip(sequences, lengths, strict=True)]
        for span in spans:
            cache.reserve(span.sequence, span.stop)
        attend = bind(strategy, cache, cache.decode(spans))
        for layer in range(cache.spec.num_layers):
            each = [qkv(cache.spec, number, span, layer) for number, span in enumerate(spans)]
            outs.append(attend(layer, *(torch.cat(parts) for parts in zip(*each, strict=True))))
    return outs


def open_for(cache: PagedCache, strategy: Strategy) -> int:
    """A new sequence, which the strategy's index observes."""
    spec = strategy.index_spec()
    return cache.open() if spec is None else cache.open(spec)


def qkv(spec: CacheSpec, number: int, span: Span, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * number + layer)
    heads = 4 * spec.num_kv_heads
    every = torch.randn(MAX_LEN, heads, spec.head_dim, generator=generator).to(spec.dtype)
    q, k, v = every.split([2 * spec.num_kv_heads, spec.num_kv_heads, spec.num_kv_heads], 1)
    here = slice(span.start, span.stop)
    return 2 * q[here], k[here], v[here]
