"""Requests larger than the memory for their KV cache: the same tokens, and clear errors where that is impossible."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from keysift.attention.strategies import retrieval
from keysift.engine import Engine, EngineConfig, Finish, FinishReason, InvalidRequest, Request, ResourceExhausted
from keysift.engine.memory.layout import lay_out
from keysift.engine.support import Facts, check
from keysift.kvcache import CacheSpec, OffloadTier
from keysift.kvcache.index import Ivf
from keysift.kvcache.tiers.file_store import FileStore
from keysift.kvcache.tiers.store import EXTENT
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens

PAIR = "dense+retrieval"
SMALL = {"dense_below": 0, "sink": 16, "window": 32}
ARGS = tuple(f"retrieval.{name}={value}" for name, value in {**SMALL, "budget": 64}.items())
NOSA = tuple(f"nosa.{name}={value}" for name, value in {**SMALL, "budget": 96, "queried": 64, "m_max": 2}.items())
LENGTH, NEW = 400, 40


def offloaded(make: Make, folder: Path | str, share: float = 1.0, **fields: object) -> Engine:
    """An engine with a backing store, whose pool is a share of the longest request's keys and values."""
    spec = make().cache.spec
    pool = int(share * spec.kv_bytes * spec.pages_for(LENGTH + NEW))
    sizes = {"kv_memory": pool, "max_num_seqs": 2, "prefill_chunk": 64}
    return make(**{"kv_offload": str(folder), "strategy": PAIR, "strategy_args": ARGS} | sizes | fields)


def answer(engine: Engine, *requests: Request) -> list[list[int]]:
    for request in requests:
        engine.add(request)
    outputs = drain(engine)
    assert engine.cache.free_pages == engine.cache.allocator.total
    return [said(outputs, request.request_id) for request in requests]


@pytest.mark.parametrize("place", ["file", "pinned"])
@pytest.mark.parametrize("strategy", ["dense", PAIR, "streaming", "dense+quest", "dense+nosa", "sift+retrieval"])
def test_a_pool_gives_the_same_tokens(strategy: str, place: str, make: Make, tmp_path: Path) -> None:
    request = Request("one", tokens(LENGTH), greedy(NEW))
    args = {PAIR: ARGS, "dense+nosa": NOSA}.get(strategy, ())
    wanted = answer(make(strategy=strategy, strategy_args=args), request)
    engine = offloaded(make, tmp_path if place == "file" else "pinned", strategy=strategy, strategy_args=args)
    assert answer(engine, request) == wanted
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cramped", [False, True])
def test_many_share_one_pool(cramped: bool, make: Make, tmp_path: Path) -> None:
    """Alone, together, after a common prefix and after preemptions."""
    prefix = tokens(128, 1)
    requests = [Request(str(i), (*prefix, *tokens(80 + 30 * i, i)), greedy(NEW)) for i in range(4)]
    fields = {"kv_offload_memory": 2**22}
    if cramped:
        spec = make().cache.spec
        fields = {"kv_offload_memory": spec.kv_bytes * 30, "prefix_cache": False}
    alone = [answer(offloaded(make, tmp_path, 0.8), request)[0] for request in requests]
    engine = offloaded(make, tmp_path, 0.8, **fields)
    assert answer(engine, *requests) == alone
    assert bool(engine.scheduler.preemptions) == cramped
    if not cramped:
        again = Request("again", requests[0].prompt, greedy(NEW))
        assert answer(engine, again) == alone[:1]


def test_traffic_is_reported(make: Make, tmp_path: Path) -> None:
    engine = offloaded(make, tmp_path, strategy="dense+nosa", strategy_args=(*NOSA, "nosa.epsilon=1"))
    engine.add(Request("one", tokens(LENGTH), greedy(NEW)))
    sparsity, spec = finish_of(drain(engine), "one").sparsity, engine.cache.spec
    assert sparsity.kv_bytes_written == (LENGTH + NEW - 1) // spec.page_size * spec.kv_bytes
    assert sparsity.decode_bytes_moved == sparsity.kv_misses * spec.read_bytes
    assert sparsity.kv_bytes_moved > sparsity.decode_bytes_moved > 0
    assert sparsity.kv_hits > sparsity.kv_misses
    read = sparsity.kv_hits + sparsity.kv_misses  # the open page aside
    heads = spec.num_layers * spec.num_kv_heads
    assert sparsity.kv_overlap is not None
    assert sparsity.kv_overlap >= 1 - (2 + 1) / (1 + read / (NEW - 1) / heads)
    assert sparsity.kv_misses <= (NEW - 2) * (2 + 1) * heads + (1 + 3 + 6) * heads  # m_max, and the first token's own
    assert sparsity.bound_exceeded == 0


def test_pages_beyond_the_memory_are_refused_with_a_hint(make: Make, tmp_path: Path) -> None:
    request = Request("one", tokens(LENGTH), greedy(NEW))
    spec = make().cache.spec
    engine = make(kv_memory=spec.page_bytes * 10, prefill_chunk=64)
    with pytest.raises(
        ResourceExhausted, match=r"kv_memory: 440 tokens .* the cache has 10 pages = .* with kv_offload"
    ):
        engine.add(request)
    engine = offloaded(make, tmp_path, kv_offload_memory=spec.kv_bytes * 10)
    with pytest.raises(
        ResourceExhausted,
        match=rf"kv_offload_memory: 440 .* need 28 pages = {28 * spec.kv_bytes} bytes, .* has 10 pages",
    ):
        engine.add(request)


@pytest.mark.parametrize(("strategy", "args"), [("sift", ("sift.dense_below=0",)), ("dense+topk", ())])
def test_a_strategy_that_scans_needs_room_for_a_layer(
    strategy: str, args: tuple[str, ...], make: Make, tmp_path: Path
) -> None:
    engine = offloaded(make, tmp_path, 0.5, max_num_seqs=1)
    request = Request("one", tokens(LENGTH), greedy(NEW), strategy=strategy, strategy_args=args)
    with pytest.raises(ResourceExhausted, match=r"kv_memory: strategy \w+ looks at all keys .* \d+ bytes for 4\d0"):
        engine.add(request)
    assert len(answer(engine, Request("two", tokens(LENGTH), greedy(4)))[0]) == 4


@pytest.mark.parametrize("index", ["ivf", "graph"])
def test_an_index_moves_pages_of_the_requests_that_name_it_alone(
    index: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt that is more than the stage holds, beside a short one whose index reads all of its own keys."""
    monkeypatch.setattr(retrieval, "Ivf", partial(Ivf, segment=64, tokens_per_list=8))
    engine = offloaded(make, tmp_path, 0.5, strategy="dense", strategy_args=())
    long = Request("long", tokens(LENGTH), greedy(NEW))
    arguments = ("dense_below=0", f"index={index}")
    short = Request("short", tokens(90, 1), greedy(NEW), strategy="retrieval", strategy_args=arguments)
    moved, kept = [], []
    for requests in ([short], [long], [short, long]):
        before = engine.cache.tier.traffic
        for request in requests:
            engine.add(replace(request, bypass_prefix_cache=True))
        ends = [output for output in drain(engine) if isinstance(output, Finish)]
        assert {end.reason for end in ends} == {FinishReason.LENGTH}
        moved.append((engine.cache.tier.traffic - before).fetched)
        kept.append(engine.cache.indexes.bytes)
    assert not engine.cache.tier.holds(engine.cache.spec.pages_for(LENGTH))
    assert moved[2] <= 1.1 * (moved[0] + moved[1])
    assert kept[2] == kept[0] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_offload": "/nowhere"}, "kv_offload: an existing folder, or 'pinned' .* got '/nowhere'"),
        ({"kv_offload_memory": 2**20}, "kv_offload_memory: none or 0 without kv_offload, as .*, got 1048576"),
        ({"kv_prefetch": 4}, "kv_prefetch: 0 without kv_offload, as .*, got 4"),
        (
            {"kv_offload": "pinned", "kv_offload_memory": 2**60},
            r"kv_offload_memory: at most the \d+ bytes .* free in host memory",
        ),
        ({"kv_offload": "pinned", "kv_offload_memory": 10}, "kv_offload_memory: at least one page = .* bytes, got 10"),
        ({"kv_offload": "pinned", "kv_memory": 2**12}, r"kv_memory: at least \d+ bytes: .* got 4096"),
        (
            {"kv_offload": ".", "kv_offload_memory": 2**60},
            r"kv_offload_memory: at most the \d+ bytes .* got 1152921504606846976",
        ),
    ],
)
def test_sizes_are_checked_before_anything_runs(fields: dict[str, object], message: str, make: Make) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(**{"kv_memory": 2**22} | fields)


def wide(make: Make, folder: Path) -> Engine:
    """Room for four requests of 27 pages each, in two extents of the file."""
    spec = make().cache.spec
    return offloaded(make, folder, 3.0, max_num_seqs=4, kv_offload_memory=128 * spec.kv_bytes, prefix_cache=False)


def test_a_full_disk_ends_the_request_that_meets_it(make: Make, tmp_path: Path) -> None:
    """The system's limit for files stands in for a full disk."""
    requests = [Request(str(i), tokens(LENGTH, i), greedy(20)) for i in range(4)]
    wanted = answer(wide(make, tmp_path), *requests)
    engine = wide(make, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * engine.cache.spec.kv_bytes, before[1]))
    try:
        for request in requests:
            engine.add(request)
        outputs = drain(engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert engine.cache.free_pages == engine.cache.allocator.total
    ends = [finish_of(outputs, request.request_id) for request in requests]
    assert [end.reason.name for end in ends] == ["LENGTH", "LENGTH", "ERROR", "ERROR"]
    for end in ends[2:]:
        assert end.exhausted
        assert re.match(r"kv_offload: the file of pages could not be extended by \d+ bytes: .* free there", end.error)
        assert str(tmp_path) not in end.error
    assert [said(outputs, str(i)) for i in range(2)] == wanted[:2]
    assert answer(engine, *requests) == wanted


def test_a_folder_that_goes_takes_nothing_with_it(make: Make, tmp_path: Path) -> None:
    request = Request("one", tokens(LENGTH), greedy(NEW))
    wanted = answer(offloaded(make, tmp_path), request)
    (folder := tmp_path / "store").mkdir()
    engine = offloaded(make, folder)
    engine.add(request)
    engine.step()
    folder.rmdir()
    assert said(drain(engine), "one") == wanted[0]


def test_a_truncated_file_ends_the_request_that_reads_it(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = offloaded(make, tmp_path, prefix_cache=False)
    engine.add(Request("one", tokens(LENGTH), greedy(NEW)))
    for _ in range(10):
        outputs = engine.step()
    tier = engine.cache.tier
    assert isinstance(tier, OffloadTier)
    assert isinstance(tier.pages.store, FileStore)
    os.ftruncate(tier.pages.store.fileno(), 0)
    outputs = drain(engine)
    end = finish_of(outputs, "one")
    assert (end.reason.name, end.exhausted) == ("ERROR", False)
    assert re.match(r"kv_offload: the file of pages could not be read: Input/output error", end.error)
    assert f"the file is in {tmp_path}" in caplog.text
    assert engine.cache.free_pages == engine.cache.allocator.total


BASE = {"kv_offload": "pinned", "max_num_seqs": 2, "prefill_chunk": 64}
SPEC = CacheSpec(num_layers=30, num_kv_heads=3, head_dim=64, dtype=torch.bfloat16)
PIECE = SPEC.num_kv_heads * SPEC.read_bytes


@pytest.mark.parametrize("sequences", [1, 2, 32])
def test_the_least_pool_that_errors_name_is_enough(sequences: int) -> None:
    """Many open pages leave no slots, unless the stage makes room."""
    config = EngineConfig(**BASE | {"max_num_seqs": sequences, "kv_memory": 1})
    with pytest.raises(InvalidRequest, match="kv_memory: at least") as refused:
        lay_out(config, SPEC, 10_000, 2**40, 0.4)
    least = int(str(refused.value).split("at least ")[1].split()[0])
    size = lay_out(config.model_copy(update={"kv_memory": least}), SPEC, 10_000, 2**40, 0.4).pool
    assert (size.slots, size.staged, size.bytes(SPEC)) == (1, 64 // SPEC.page_size + 1, least)
    with pytest.raises(InvalidRequest, match=f"at least {least} bytes: .*, got {least - 1}"):
        lay_out(config.model_copy(update={"kv_memory": least - 1}), SPEC, 10_000, 2**40, 0.4)


@pytest.mark.parametrize("kv_memory", [2**25, 2**28, 2**31])
@pytest.mark.parametrize("longest", [300, 131_072])
@pytest.mark.parametrize("sequences", [1, 16])
def test_a_pool_is_within_its_bytes(sequences: int, longest: int, kv_memory: int) -> None:
    config = EngineConfig(**BASE | {"max_num_seqs": sequences, "kv_memory": kv_memory})
    layout = lay_out(config, SPEC, longest, 2**40, 0.4)
    size, pages = layout.pool, SPEC.pages_for(longest)
    assert layout.pool_bytes == size.bytes(SPEC) <= kv_memory
    assert size.staged <= pages
    assert size.slots <= pages * sequences
    full = size.slots == pages * sequences and size.staged == pages
    assert full or layout.pool_bytes > kv_memory - SPEC.num_layers * PIECE, "less than a page of each layer is left"


def test_a_store_takes_whole_extents_within_its_bytes() -> None:
    config = EngineConfig(**BASE | {"kv_offload_memory": 200 * SPEC.kv_bytes})
    assert lay_out(config, SPEC, 10_000, 2**40, 0.4).frames == 3 * EXTENT
    few = config.model_copy(update={"kv_offload_memory": 20 * SPEC.kv_bytes})
    assert lay_out(few, SPEC, 10_000, 2**40, 0.4).frames == 20


def test_a_pinned_store_is_measured_by_host_memory() -> None:
    """The device's memory counts for resident data only, unless it is the host's."""
    config = EngineConfig(**BASE)
    separate = lay_out(config, SPEC, 131_072, 2**30, 0.4, host=2**34)
    assert separate.store_bytes > 2**30 > separate.pool_bytes + separate.described_bytes
    little = lay_out(config, SPEC, 131_072, 2**30, 0.4, host=2**28)
    assert little.store_bytes <= 0.4 * 2**28
    both = config.model_copy(update={"kv_memory": 2**29, "kv_offload_memory": 2**29})
    with pytest.raises(
        InvalidRequest, match=r"kv_offload_memory: \d+ pages need \d+ .* codes and \d+ for themselves, .*"
    ):
        lay_out(both, SPEC, 131_072, 2**30, 0.4)
    assert lay_out(both, SPEC, 131_072, 2**30, 0.4, host=2**30).store_bytes <= 2**29


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_by_default_all_of_it_fits(page_size: int) -> None:
    """Summaries and codes of small pages take as much memory as their keys and values."""
    spec = replace(SPEC, page_size=page_size)
    layout = lay_out(EngineConfig(kv_offload="pinned"), spec, 131_072, 2**30, 0.4)
    assert 0.7 * 2**30 < layout.store_bytes + layout.described_bytes + layout.pool_bytes <= 0.8 * 2**30


def test_a_gpu_reads_no_files(tmp_path: Path) -> None:
    config = EngineConfig(**BASE | {"kv_offload": str(tmp_path)})
    with pytest.raises(InvalidRequest, match=r"kv_offload: none or pinned on cuda, as files are read by .*, got '/"):
        check(config, Facts(runs_on=torch.device("cuda")))


SCRIPT = """
import sys
from keysift.engine import Engine, EngineConfig, Request, SamplingParams
sizes = dict(kv_memory=2**20, prefill_chunk=64, max_num_seqs=2)
engine = Engine(EngineConfig(model=sys.argv[1], kv_offload=sys.argv[2], **sizes))
engine.add(Request("one", tuple(range(3, 203)), SamplingParams(max_new_tokens=100, ignore_eos=True)))
for _ in range(20):
    engine.step()
print("ready", flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_on_disk_after_a_crash(tiny_llama: Path, tmp_path: Path) -> None:
    """The file has no name while the process runs, and is gone with it."""
    command = [sys.executable, "-c", SCRIPT, str(tiny_llama), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        held = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert [name for name in held if name.startswith(str(tmp_path))]
        assert not list(tmp_path.iterdir())
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.iterdir())
