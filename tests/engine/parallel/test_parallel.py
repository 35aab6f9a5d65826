"""Tensor parallelism: the tokens of one process, and refusals before any process is started."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from keysift.attention import Coverage, Dense, Locality, Reads
from keysift.engine import (
    Engine,
    EngineConfig,
    Finish,
    InvalidRequest,
    Output,
    Request,
    SamplingParams,
    TokenOutput,
    ranks,
)
from keysift.engine.execution.forward import ForwardInput, StepResult
from keysift.engine.measure.evaluation.reader import Reader
from keysift.engine.parallel.merge import merge_ranks
from keysift.engine.parallel.orders import Order, RecordedCache, replay
from keysift.kvcache import CacheSpec, OutOfFrames, PagedCache, Phase, Traffic
from keysift.kvcache.index import FlatIndex, Graph, Ivf
from tests.engine.driver import drain, finish_of, greedy, said, tokens
from tests.models import splits_odd_heads

PAGES = 34
PAGE_BYTES = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=8, dtype=torch.float32, code_bits=2).page_bytes
SPARSE: dict[str, Any] = {
    "strategy": "sift+retrieval",
    "strategy_args": (
        "dense_below=0",
        "sift.threshold=0.1",
        "sift.coverage=0",
        "sift.sink=16",
        "sift.local=32",
        "retrieval.sink=16",
        "retrieval.window=32",
        "retrieval.budget=32",
        "retrieval.epsilon=0",
    ),
}
INDEXED = SPARSE | {"strategy_args": (*SPARSE["strategy_args"], "retrieval.index=ivf")}
"""Options with an index that each rank builds for its own heads."""
PROMPTS = [tokens(150 + 20 * i, i) for i in range(3)]


def build(folder: Path, size: int, **config: Any) -> Engine:
    """An engine of `size` ranks with room for `PAGES` pages of the tiny model, each rank for its heads' part."""
    fields = {"strategy": "dense", "dtype": "float32", "prefill_chunk": 64, "kv_memory": PAGES * PAGE_BYTES // size}
    return Engine(EngineConfig(**{"model": str(folder), "tensor_parallel_size": size} | fields | config))


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> Engine:
    return build(tiny_llama, 1)


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> Iterator[Engine]:
    engine = build(tiny_llama, 2)
    yield engine
    assert engine.status.pages_free == engine.status.pages_total
    engine.close()


def run(engine: Engine, *requests: Request) -> list[Output]:
    for request in requests:
        engine.add(request)
    return drain(engine)


@splits_odd_heads
def test_each_has_its_own_heads_and_all_have_the_same_pages(alone: Engine, pair: Engine) -> None:
    assert (alone.model.num_query_heads, alone.model.num_kv_heads) == (4, 2)
    assert (pair.model.ranks, pair.model.num_query_heads, pair.model.num_kv_heads) == (2, 2, 1)
    assert alone.status.pages_total == pair.status.pages_total == PAGES
    assert pair.status.page_bytes == alone.status.page_bytes // 2


@splits_odd_heads
@pytest.mark.parametrize("how", [{}, SPARSE, INDEXED], ids=["dense", "sparse", "indexed"])
def test_several_requests_give_the_tokens_of_one_process(alone: Engine, pair: Engine, how: dict[str, Any]) -> None:
    salt = str(how)  # none finds pages of another test
    requests = [Request(str(i), prompt, greedy(24), cache_salt=salt, **how) for i, prompt in enumerate(PROMPTS)]
    before = pair.scheduler.preemptions
    expected, outputs = run(alone, *requests), run(pair, *requests)
    for request in requests:
        assert said(outputs, request.request_id) == said(expected, request.request_id)
        assert len(said(outputs, request.request_id)) == 24
    assert pair.scheduler.preemptions > before, "the pages of some had to be taken away and computed again"


@splits_odd_heads
def test_statistics_are_of_all_heads(alone: Engine, pair: Engine) -> None:
    found = []
    for engine in (alone, pair):
        outputs = run(engine, Request("a", tokens(300, 7), greedy(20), bypass_prefix_cache=True, **SPARSE))
        found.append(asdict(finish_of(outputs, "a").sparsity))
    expected, shared = found
    assert 0 < expected["prefill_density"] < 1
    assert 0 < expected["decode_density"] < 1
    assert {name: shared[name] for name in expected} == {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for name, value in expected.items()
    }


@splits_odd_heads
def test_an_abort_in_the_middle_leaves_the_others_alone(alone: Engine, pair: Engine) -> None:
    expected = said(run(alone, Request("stays", PROMPTS[1], greedy(16), **SPARSE)), "stays")
    pair.add(Request("stays", PROMPTS[1], greedy(16), **SPARSE))
    pair.add(Request("goes", PROMPTS[2], greedy(40), **SPARSE))
    outputs: list[Output] = []
    while not any(isinstance(output, TokenOutput) and output.request_id == "goes" for output in outputs):
        outputs += pair.step()
    assert pair.abort("goes")
    outputs += drain(pair)
    assert said(outputs, "stays") == expected
    assert 0 < len(said(outputs, "goes")) < 40


@splits_odd_heads
def test_pages_are_found_again_and_sampled_tokens_are_the_leaders(alone: Engine, pair: Engine) -> None:
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.8, seed=3, logprobs=2)
    said_by = []
    for engine in (alone, pair):
        run(engine, Request("first", tokens(130, 9), greedy(2)))
        outputs = run(engine, Request("again", tokens(130, 9), params))
        said_by.append(said(outputs, "again"))
        assert finish_of(outputs, "again").usage.cached_tokens == 128
        assert all(len(output.logprobs[0]) == 3 for output in outputs if isinstance(output, TokenOutput))
    assert said_by[0] == said_by[1]


@splits_odd_heads
def test_an_idle_group_runs_again(pair: Engine) -> None:
    assert pair.step() == []
    (finish,) = (output for output in run(pair, Request("a", tokens(5), greedy(1))) if isinstance(output, Finish))
    assert finish.usage.completion_tokens == 1


@splits_odd_heads
def test_a_process_leads_one_group_which_is_not_for_evaluations(tiny_llama: Path, pair: Engine) -> None:
    with pytest.raises(InvalidRequest, match=r"tensor_parallel_size: 1 in a process that is in a process group"):
        build(tiny_llama, 2)
    with pytest.raises(
        InvalidRequest,
        match=r"tensor_parallel_size: 1 for evaluation .*, as one process looks at all heads there, got 2",
    ):
        Reader(pair)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tensor_parallel_size": 0}, r"tensor_parallel_size: .* greater than or equal to 1, got 0"),
        ({"tensor_parallel_size": 3}, r"tensor_parallel_size: a divisor of the model's 2 KV heads, got 3"),
        ({"quantization": "int8"}, r"quantization: none with tensor_parallel_size 2, as .*, got 'int8'"),
        ({"kv_offload": "."}, r"kv_offload: none with tensor_parallel_size 2, as .*, got '\.'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_combinations_with_ranks_are_refused_by_field(tiny_llama: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build(tiny_llama, 2, **config)


def test_gpus_are_counted(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidRequest, match=r"tensor_parallel_size: at most 1, the CUDA devices here, got 2"):
        build(tiny_llama, 2)
    with pytest.raises(InvalidRequest, match=r"device: auto, cpu or cuda with tensor_parallel_size 2, .* got 'cuda:0'"):
        build(tiny_llama, 2, device="cuda:0")
    with pytest.raises(InvalidRequest, match=r"device: auto or cuda with tensor_parallel_size 2 where there are GPUs"):
        build(tiny_llama, 2, device="cpu")


def test_torchrun_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidRequest, match=r"tensor_parallel_size: 1 under torchrun"):
        build(tiny_llama, 2)


def test_pages_and_indexes_of_a_replica_change_alike() -> None:
    spec = CacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32, code_bits=2)
    sizes = {"max_sequences": 4, "max_len": 128}
    cache, replica = RecordedCache(spec, 8, **sizes), PagedCache(spec, 8, **sizes)
    first, second = cache.open(Ivf(), FlatIndex()), cache.open()
    cache.reserve(first, 64)
    cache.keep(first, [b"a", b"b"])
    cache.share(second, cache.prefix.match([b"a", b"b"]))
    with pytest.raises(OutOfFrames):
        cache.reserve(second, 128)
    cache.reserve(second, 96)
    cache.rollback(second, 64)
    cache.release(cache.open(Graph()))
    cache.withdraw(first)
    cache.release(first)
    order = Order(cache.take_changes(), cache.free_pages, ForwardInput(Phase.DECODE, Dense(), (), [], 0), [])
    replay(replica, pickle.loads(pickle.dumps(order)))
    assert replica._frames == cache._frames
    assert replica.allocator._free == cache.allocator._free
    assert list(replica.indexes._known) == list(cache.indexes._known) == [Graph(), Ivf(), FlatIndex()]
    assert len(replica.prefix) == len(cache.prefix) == 0
    with pytest.raises(RuntimeError, match=r"4 pages are free here, 7 at the leader"):
        replay(replica, Order([], 7, order.work, []))


def test_the_least_and_the_mean_of_all_ranks_count() -> None:
    parts = [Coverage(10, 9.0, 0.7, 0.0, 0.0, 0.5), Coverage(10, 7.0, 0.1, 1.0, 2.0, math.nan, chose=True)]
    reads = [Reads(4.0, 8.0, 100), Reads(8.0, 8.0, 200)]
    both = zip(reads, parts, strict=True)
    ranks = [StepResult([], [read], [part], Traffic(1), [Locality(1, 0.5)]) for read, part in both]
    found = merge_ranks(ranks)
    assert (found.reads, found.traffic, found.locality) == ([Reads(6.0, 8.0, 300)], Traffic(2), [Locality(2, 1.0)])
    (kept,) = found.coverage
    assert (kept.tokens, kept.mean, kept.least, kept.widened_share, kept.estimated_share) == (10, 0.8, 0.1, 0.05, 0.1)
    assert kept.chose
    assert kept.dropped_bound is None, "one of them does not know"


def test_processes_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(ranks, "num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    ranks.share_cores(3)
    monkeypatch.delenv("OMP_NUM_THREADS")
    ranks.share_cores(3)
    ranks.share_cores(16)
    assert chosen == [2, 1]
