"""One request whose pages live in host memory and of which a pool holds an eighth, against the same all on the device.

A few layers with the same keys and queries, so that prefetching can overlap with computation.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from keysift.attention import Strategy, bind, make
from keysift.engine import EngineConfig
from keysift.engine.memory.budget import free_memory
from keysift.engine.memory.layout import PINNED, lay_out, make_tier
from keysift.kvcache import CacheSpec, OffloadTier, PagedCache, Span, Traffic

from ..lib.layer import ROW, Source
from .rows import Aim, Row, Settings, attempt, best, free, ratio

SHARE = 1 / 8
"""Share of the keys and values that the pool holds."""
WARM = 16
"""Tokens before the clock counts."""
SLOWER = 1.5
"""Aim: the most time that a token takes, against all pages on the device."""
FAR = 1 << 17
NAMES = ("retrieval", "nosa")
AHEAD = (0, 16)
"""Pages that a token may prefetch."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt in a cache, its own next tokens, and what decodes them."""

    settings: Settings
    source: Source
    cache: PagedCache
    strategy: Strategy
    prompt: int

    def fill(self) -> int:
        """Write the prompt; returns the sequence."""
        cache, sequence = self.cache, self.cache.open()
        cache.reserve(sequence, self.prompt)
        for start in range(0, self.prompt, chunk := _chunk(self.settings)):
            stop = min(start + chunk, self.prompt)
            step = cache.prefill(Span(sequence, start, stop - start), ROW, self.prompt - stop)
            q, k, v = self.source.part(start, stop, cache.spec.dtype)
            for layer in range(cache.spec.num_layers):
                cache.append(layer, k, v, step)
                cache.observe(layer, q, step)
        return sequence

    def token(self, sequence: int, position: int) -> Callable[[], object]:
        """All layers' attention of one token."""
        cache = self.cache
        cache.reserve(sequence, position + 1)
        attend = bind(self.strategy, cache, cache.decode([Span(sequence, position, 1)]))
        token = self.source.part(position, position + 1, cache.spec.dtype)
        return lambda: [attend(layer, *token) for layer in range(cache.spec.num_layers)]


def rows(settings: Settings) -> Iterator[Row]:
    yield {"what": "copy from the host to the device", "GB/s": settings.clock.host_rate()}
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        source = Source.make(settings.shape, settings.long)
    for name in NAMES:
        strategy = make(name, **_options(settings))
        fixed = {"context": settings.long}
        yield attempt({"what": f"{name}, resident", **fixed}, lambda s=strategy: _resident(settings, source, s))  # type: ignore[misc]
        free()
        for ahead in AHEAD:
            label = f"{name}, offloaded" + (f", {ahead} ahead" if ahead else "")
            yield attempt(
                {"what": label, **fixed},
                lambda s=strategy, a=ahead: _offloaded(settings, source, s, a),  # type: ignore[misc]
            )
            free()


def _options(settings: Settings) -> dict[str, object]:
    """The defaults; a small pool needs small zones."""
    return {"budget": 64, "sink": 16, "window": 16} if settings.small else {}


def _chunk(settings: Settings) -> int:
    """Tokens of a prompt's step: a small part of what the pool takes."""
    return max(min(settings.chunk, settings.long // 16) // ROW * ROW, ROW)


def _spec(settings: Settings) -> CacheSpec:
    _, kv_heads, dim = settings.shape
    return CacheSpec(2 if settings.small else 4, kv_heads, dim, dtype=torch.bfloat16)


def _resident(settings: Settings, source: Source, strategy: Strategy) -> Row:
    spec = _spec(settings)
    cache = PagedCache(
        spec, spec.pages_for(settings.long), max_sequences=1, max_len=settings.long, device=settings.device
    )
    return _timed(settings, source, cache, strategy)


def _offloaded(settings: Settings, source: Source, strategy: Strategy, ahead: int) -> Row:
    """As the engine lays it out: part of the pool is a stage for prompts."""
    spec, device = _spec(settings), settings.device
    pool = int(SHARE * spec.pages_for(settings.long) * spec.kv_bytes)
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            kv_offload=PINNED if device.type == "cuda" else folder, kv_memory=pool, kv_prefetch=ahead,
            kv_offload_memory=spec.pages_for(settings.long + 1024) * spec.kv_bytes,
            max_num_seqs=1, prefill_chunk=_chunk(settings),
        )  # fmt: skip
        host = free_memory(torch.device("cpu")) if device.type == "cuda" else None
        layout = lay_out(config, spec, settings.long, free_memory(device), 0.9, host)
        tier = make_tier(config, spec, layout, device)
        try:
            cache = PagedCache(spec, layout.frames, max_sequences=1, max_len=settings.long, device=device, tier=tier)
            return {**_timed(settings, source, cache, strategy), "pool_slots": layout.pool.slots}
        finally:
            tier.close()


def _timed(settings: Settings, source: Source, cache: PagedCache, strategy: Strategy) -> Row:
    warm = 2 if settings.small else WARM
    prompt = settings.long - warm - settings.steps
    request = Request(settings, source, cache, strategy, prompt)
    sequence, clock = request.fill(), settings.clock
    seconds: list[float] = []
    before = Traffic()
    for position in range(prompt, settings.long):
        if position == prompt + warm:
            before = cache.tier.traffic
        token = request.token(sequence, position)
        clock.wait()
        seconds.append(clock.single(token))
    layers = cache.spec.num_layers
    return {
        "us": 1e6 * statistics.median(seconds[warm:]) / layers,
        **(_moved(cache.tier.traffic - before, settings.steps * layers) if _moves(cache) else {}),
    }


def _moves(cache: PagedCache) -> bool:
    return isinstance(cache.tier, OffloadTier)


def _moved(traffic: Traffic, parts: int) -> Row:
    """Bytes, hits and useful prefetches per token and layer."""
    return {
        "bytes": traffic.fetched / parts,
        "overlap": traffic.hits / max(traffic.hits + traffic.misses, 1),
        "guessed": traffic.prefetch_hits / traffic.prefetched if traffic.prefetched else None,
    }


def aims(rows: Sequence[Row]) -> list[Aim]:
    found = []
    for name in NAMES:
        resident = best(rows, "us", what=f"{name}, resident", context=FAR)
        away = best(rows, "us", what=f"{name}, offloaded", context=FAR)
        slower = ratio(away, resident, "us")
        found.append(Aim(f"{name}, offloaded at 128k, time against resident", slower, SLOWER, False))
    return found
