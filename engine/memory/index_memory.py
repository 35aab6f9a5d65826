"""Memory of what indexes build, beside that of the pages."""

from __future__ import annotations

from keysift.attention import parse
from keysift.kvcache import CacheSpec
from keysift.kvcache.index.room import Room

from ..config import EngineConfig

PART = 8
"""Pages take so many times what indexes may build by default."""


def left_for_pages(config: EngineConfig, spec: CacheSpec, given: int) -> int:
    """Bytes of ``kv_memory`` that pages take: all of them, unless the index of the engine's own strategy builds."""
    if not _builds(config, spec):
        return given
    return given * PART // (PART + 1) if config.index_memory is None else max(given - int(config.index_memory), 0)


def index_bytes(config: EngineConfig, pages: int) -> int:
    """Most bytes that indexes may build beside pages of so many bytes."""
    return pages // PART if config.index_memory is None else int(config.index_memory)


def _builds(config: EngineConfig, spec: CacheSpec) -> bool:
    index = parse(config.strategy, config.strategy_args).index_spec()
    try:
        return index is not None and index.make(spec, Room()).entries is not None
    except ValueError:  # it does not fit: the strategy is refused once there is a cache to say so
        return False
