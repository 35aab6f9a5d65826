"""Backing store that fails at random: requests without a fault give the same tokens, and no page is lost."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from keysift.engine import Engine, Request
from keysift.kvcache.tiers.offload import OffloadTier
from keysift.kvcache.tiers.store import BackingStore
from tests.engine.driver import Make, drain, greedy, tokens
from tests.engine.faults import KINDS, check_said

ARGS = ("retrieval.dense_below=0", "retrieval.sink=16", "retrieval.window=32", "retrieval.budget=64")


class FaultyHome:
    """A store whose reads, writes and claims fail at random, half done."""

    def __init__(self, store: BackingStore, share: float, seed: int) -> None:
        self._store, self._share = store, share
        self._chance = random.Random(seed)
        self.failed = self.fetched = 0

    def claim(self, frames: Iterable[int]) -> None:
        self._store.claim(frames)
        self._maybe(0.2)

    def write(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        self._store.write(layer, frames[:-1], pages[:-1])
        self._maybe()
        self._store.write(layer, frames, pages)

    def read(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        self._maybe(spoilt=pages)
        self._store.read(layer, frames, pages)

    def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
        self.fetched += int((loads >= 0).sum())
        self._maybe(4.0)
        self._store.fetch(layer, pool, loads, slots)

    def close(self) -> None:
        self._store.close()

    def _maybe(self, less: float = 1.0, spoilt: Tensor | None = None) -> None:
        if self._chance.random() >= self._share * less:
            return
        self.failed += 1
        if spoilt is not None:
            spoilt.fill_(float("nan"))
        KINDS[self._chance.choice(list(KINDS))]()


def offloaded(make: Make, folder: Path, strategy: str) -> Engine:
    spec = make().cache.spec
    sizes = {
        "kv_memory": spec.kv_bytes * 46,
        "kv_offload_memory": spec.kv_bytes * 60,
        "max_num_seqs": 4,
        "max_model_len": 256,
    }
    return make(kv_offload=str(folder), strategy=strategy, strategy_args=ARGS, prefill_chunk=64, **sizes)


@pytest.mark.parametrize("seed", range(2))
def test_other_requests_give_the_same_tokens(make: Make, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    wanted = [Request(str(i), tokens(chance.randint(60, 200), i % 3), greedy(chance.randint(4, 30))) for i in range(16)]
    answers = []
    for faulty in (False, True):
        engine = offloaded(make, tmp_path, "dense+retrieval")
        tier = engine.cache.tier
        assert isinstance(tier, OffloadTier)
        if faulty:
            tier.pages.store = faults = FaultyHome(tier.pages.store, 0.02, seed)
        for each in wanted:
            engine.add(each)
        answers.append(drain(engine))
        assert engine.cache.free_pages == engine.cache.allocator.total
    clean, outputs = answers
    assert min(faults.failed, faults.fetched // 50) > 2
    check_said(outputs, clean, [each.request_id for each in wanted])
