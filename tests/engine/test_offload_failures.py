"""Backing store that fails at random: requests without a fault give the same tokens, and no page is lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from keysift.engine import Engine, Request
from keysift.kvcache.tiers.offload import OffloadTier
from tests.engine.driver import Make, drain, greedy, tokens
from tests.engine.faults import FaultyHome, check_said

ARGS = ("retrieval.dense_below=0", "retrieval.sink=16", "retrieval.window=32", "retrieval.budget=64")


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
