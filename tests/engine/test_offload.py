"""One request larger than the memory for its KV cache: the same tokens, and clear words where it cannot be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from keysift.engine import Engine, Request
from tests.engine.driver import Make, drain, greedy, said, tokens

PAIR = "dense+retrieval"
ARGS = ("retrieval.dense_below=0", "retrieval.sink=16", "retrieval.window=32", "retrieval.budget=64")
LENGTH, NEW = 400, 40


def home(make: Make, folder: Path | str, share: float, **fields: object) -> Engine:
    """An engine whose pool is a share of what the longest request's keys and values take."""
    spec = make().cache.spec
    pool = int(share * spec.kv_bytes * spec.pages_for(LENGTH + NEW))
    sizes = {"kv_memory": pool, "max_num_seqs": 2, "prefill_chunk": 64}
    return make(**{"kv_home": str(folder), "strategy": PAIR, "strategy_args": ARGS} | sizes | fields)


def answer(engine: Engine, *requests: Request) -> list[list[int]]:
    for request in requests:
        engine.add(request)
    outputs = drain(engine)
    assert engine.cache.free_pages == engine.cache.allocator.total
    return [said(outputs, request.request_id) for request in requests]


@pytest.mark.parametrize("place", ["file", "pinned"])
@pytest.mark.parametrize("strategy", ["dense", PAIR, "streaming", "dense+quest", "sift+retrieval"])
def test_a_pool_gives_the_same_tokens(strategy: str, place: str, make: Make, tmp_path: Path) -> None:
    request = Request("one", tokens(LENGTH), greedy(NEW))
    fields = {"strategy": strategy, "strategy_args": ARGS if strategy == PAIR else ()}
    wanted = answer(make(**fields), request)
    engine = home(make, tmp_path if place == "file" else "pinned", 1.0, **fields)
    assert answer(engine, request) == wanted
