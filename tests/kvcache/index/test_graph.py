"""The graph index: its building blocks against their reference, what it finds, and that nothing stale is found."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keysift.kvcache import CacheSpec, Context, PagedCache, Span, Step
from keysift.kvcache.index import CodeIndex, Graph, GraphIndex
from keysift.kvcache.index.graph import build
from keysift.kvcache.index.graph.ops import Found, KeyGraph, Reach, link_keys, nearest_keys, search_graphs
from keysift.kvcache.index.graph.queries import KeptQueries
from keysift.kvcache.index.graph.worker import Job, submit
from keysift.kvcache.index.room import BLOCK_BYTES, PAGE_BYTES, Room
from keysift.kvcache.ops.dispatch import use_backend

native = pytest.importorskip("keysift.kvcache.native.library")

SPEC = CacheSpec(num_layers=1, num_kv_heads=2, head_dim=16, page_size=4)
HEADS = 4
WAITING = Graph(degree=8, beam=48, top_k=12, queries=64, lag=16, sink=4, window=8, wait=True)


def integers(*shape: int, high: int = 4) -> Tensor:
    """Small whole numbers, of which all sums are exact: ties, but no rounding."""
    return torch.randint(-high, high + 1, shape).float()


@dataclass
class Text:
    """A sequence of one cache, and what was written to it."""

    cache: PagedCache
    sequence: int
    keys: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return sum(len(part) for part in self.keys)

    def step(self, count: int, q: Tensor, k: Tensor, start: int | None = None) -> Step:
        """A chunk of a prompt, observed; queries one in a row."""
        start = self.length if start is None else start
        self.cache.reserve(self.sequence, start + count)
        step = self.cache.prefill(Span(self.sequence, start, count), queries_per_row=1)
        run(self.cache, step, q, k)
        self.keys.append(k)
        return step


def run(cache: PagedCache, step: Step, q: Tensor, k: Tensor) -> None:
    cache.append(0, k, torch.zeros_like(k), step)
    cache.observe(0, q, step)


def opened(spec: Graph = WAITING, *, cache: CacheSpec = SPEC, frames: int = 64) -> tuple[PagedCache, GraphIndex, Text]:
    paged = PagedCache(cache, frames, max_sequences=4, max_len=frames * cache.page_size)
    index = paged.index(spec)
    assert isinstance(index, GraphIndex)
    return paged, index, Text(paged, paged.open(spec))


def jobs(index: GraphIndex) -> list[Job]:
    return [job for block in index.entries._graphs._blocks.values() for job in block.parts.values()]


def search(index: GraphIndex, q: Tensor, context: Context) -> Found:
    """The hits that the masses of the index come from."""
    return index._search(q, context, [graph for graph, _ in index._graphs(context)], context.step.starts)


def exact(q: Tensor, keys: Tensor, positions: Tensor, spec: Graph, page_size: int) -> Tensor:
    """[R, Hq, T] scores times sqrt(D), -inf for what is no hit: the future, the first tokens and the last ones."""
    grouped = torch.unflatten(q.float(), 1, (keys.shape[1], -1))
    scores = torch.einsum("rkgd,tkd->rkgt", grouped, keys.float()).flatten(1, 2)
    token = torch.arange(len(keys))
    first = -(-spec.sink // page_size) * page_size
    window = ((positions - spec.window + 1).clamp(min=0) // page_size * page_size).clamp(min=first)
    return scores.masked_fill(((token < first) | (token >= window[:, None]))[:, None], -torch.inf)


def recall(found: Tensor, scores: Tensor, top_k: int) -> float:
    best = scores.topk(top_k, -1).indices
    return float((found[..., :, None] == best[..., None, :]).any(-2).float().mean())


@pytest.fixture(params=native.isas())
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with native.use_isa(request.param):
        yield


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "page_size", "wanted"), [(1, 1, 8, 3), (2, 3, 4, 9), (3, 2, 5, 200)])
def test_the_native_twins_do_what_the_reference_does(
    dtype: torch.dtype, kv_heads: int, group: int, page_size: int, wanted: int
) -> None:
    frames = torch.randperm(24)[:20].int()
    tokens = 18 * page_size
    k = torch.full((24, kv_heads, page_size, 32), torch.nan, dtype=dtype)
    k[frames.long()] = integers(20, kv_heads, page_size, 32).to(dtype)
    queries = integers(kv_heads, 40, 32).to(dtype)
    q = integers(3, kv_heads * group, 32).to(dtype)
    positions = torch.tensor([tokens + page_size + 2, tokens - 3, -1], dtype=torch.int32)
    table = frames.view(1, 1, -1).expand(3, kv_heads, -1)
    reach = Reach(degree=6, beam=10, top_k=7, sink=3, window=9)
    results = []
    for backend in ("reference", "native"):
        with use_backend(backend):  # type: ignore[arg-type]
            nearest = nearest_keys(queries, k, frames, 3, tokens, wanted)
            links = link_keys(nearest, tokens, reach.degree)
            graph = KeyGraph(
                links, integers(kv_heads, 9, high=30).abs().int() if not results else results[0][0].points, 2
            )
            graphs = [graph, graph, None]
            results.append((graph, nearest, search_graphs(q, k, table, positions, graphs, reach, 0.25)))
    (reference, nearest, found), (other, other_nearest, other_found) = results
    assert torch.equal(nearest, other_nearest)
    assert torch.equal(reference.links, other.links)
    for one, two in zip(found[:3], other_found[:3], strict=True):
        assert torch.equal(one, two)
    torch.testing.assert_close(found.masses, other_found.masses)
    assert (found.keys[2] == -1).all()
    assert (found.keys[0] >= 0).all()


@pytest.mark.parametrize("chunks", [[240], [1] * 240, [7, 60, 33, 1, 1, 138]], ids=str)
def test_the_queries_kept_are_those_that_any_graph_takes(chunks: list[int]) -> None:
    """Evenly spread ones of each graph's own tokens, at most so many; written again they are the last ones."""
    cache = PagedCache(SPEC, 64, max_sequences=1, max_len=256)
    kept = KeptQueries(SPEC, Room(), most=8, grain=5)
    sequence, q = cache.open(), torch.arange(240.0)[:, None, None].expand(-1, HEADS, 16)
    cache.reserve(sequence, 240)
    start = 0
    for length in chunks:
        for change in (0.25, 0.5):
            step = cache.prefill(Span(sequence, start, length), queries_per_row=1)
            kept.add(q[start : start + length] + change, cache.context(0, step), 0, 0)
        start += length
    context = cache.context(0, step)
    for pages, stride in ((10, 8), (15, 8), (20, 16), (30, 16), (35, 32), (60, 32)):
        found = kept.training(context, 0, pages)[:, 0, 0].tolist()
        assert found == [position + 0.5 for position in range(0, 4 * pages, stride)]
        assert len(found) <= 8
    counts = [count for page in range(60) if (count := len(kept._positions(page)))]
    assert kept.bytes == sum(counts) * HEADS * 16 * 4 + len(counts) * (BLOCK_BYTES + PAGE_BYTES)
    none = KeptQueries(SPEC, Room(), most=0, grain=5)
    none.add(q, context, 0, 0)
    assert none.training(context, 0, 10).shape[0] == none.bytes == 0


@pytest.mark.parametrize("began", [(2, 0), (0, 1)], ids=["within the page", "at a later layer"])
def test_the_queries_of_a_page_are_kept_from_its_first_on_or_not_at_all(began: tuple[int, int]) -> None:
    """Room that comes later is no reason to keep half of them."""
    cache = PagedCache(replace(SPEC, num_layers=2), 8, max_sequences=1, max_len=32)
    room = Room(0)
    kept = KeptQueries(cache.spec, room, most=64, grain=4)
    sequence = cache.open()
    cache.reserve(sequence, 8)
    for position in range(8):
        step = cache.prefill(Span(sequence, position, 1), queries_per_row=1)
        for layer in range(2):
            room.limit = None if (position, layer) >= began else 0
            kept.add(torch.ones(1, HEADS, 16), cache.context(layer, step), 0, 0)
    pages = list(step.contents(0, 0, 2).pages())
    assert (kept.known(pages), kept.known(pages[1:])) == (0, 1)
    assert len(kept.training(cache.context(0, step), 0, 2)) == 4


def test_masses_are_those_of_the_hits_and_of_all_that_is_scanned() -> None:
    _, index, text = opened()
    q, k = torch.randn(180, HEADS, 16), torch.randn(180, 2, 16)
    text.step(178, q[:178], k[:178])
    step = text.step(2, q[178:], k[178:])
    context = text.cache.context(0, step)
    masses, hits = index.masses(q[178:], context), search(index, q[178:], context)
    scores = exact(q[178:], k, torch.tensor([10**6, 10**6]), Graph(sink=0, window=1), 4) * 16**-0.5
    pages = torch.unflatten(scores.masked_fill(torch.arange(180) > step.starts[:, None, None], -torch.inf), -1, (-1, 4))
    whole_pages = pages.logsumexp(-1)
    weights = torch.zeros(2, HEADS, 45).scatter_add_(2, hits.keys.long() // 4, hits.scores.exp())
    own = weights.log()
    torch.testing.assert_close(masses[..., :1], whole_pages[..., :1])
    torch.testing.assert_close(masses[..., 43:], whole_pages[..., 43:])
    between = masses[..., 1:42].clone()
    scanned = torch.isclose(between, whole_pages[..., 1:42])  # after the graph's end
    torch.testing.assert_close(between.masked_fill(scanned, 0.0), own[..., 1:42].masked_fill(scanned, 0.0))
    assert (hits.scores.diff(dim=-1) <= 0).all()
    assert ((hits.keys >= 4) & (hits.keys < 172)).all()
    torch.testing.assert_close(hits.scores, scores.gather(-1, hits.keys.long()))


def far(length: int, clusters: int) -> tuple[Tensor, Tensor]:
    """Queries [length, Hq, D] and keys [length, Hkv, D] that live apart: queries look between the clusters of keys."""
    spec = replace(SPEC, head_dim=32, num_kv_heads=1)
    centres = torch.randn(clusters, 32)
    k = centres[torch.randint(clusters, (length,))] + 0.4 * torch.randn(length, 32)
    aims = torch.randn(16, 3, 32) @ torch.randn(32, 32)
    q = aims[torch.randint(16, (length,)), torch.randint(3, (length,))] + 2.0 * torch.randn(length, 32) + 4.0
    return q[:, None].expand(-1, 2, -1).contiguous(), (k + 1.5)[:, None].expand(-1, spec.num_kv_heads, -1).contiguous()


def searched(options: Graph, q: Tensor, k: Tensor) -> tuple[float, float]:
    """Recall and share of keys scanned, of queries after the prompt that trained the graph."""
    spec = CacheSpec(num_layers=1, num_kv_heads=k.shape[1], head_dim=k.shape[2], page_size=8)
    cache, index, text = opened(options, cache=spec, frames=len(k) // 8 + 1)
    start = len(k) - 64
    text.step(start, q[:start], k[:start])
    index.masses(q[:1], cache.context(0, cache.prefill(Span(text.sequence, start - 1, 1), 1)))
    step = text.step(64, q[start:], k[start:])
    hits = search(index, q[start:], cache.context(0, step))
    scores = exact(q[start:], k, step.starts, options, 8)
    return recall(hits.keys, scores, options.top_k), float(hits.scanned.float().mean()) / len(k)


def test_clustered_keys_are_found() -> None:
    options = replace(WAITING, degree=16, beam=64, top_k=20, queries=256, lag=64)
    centres = torch.randn(32, 1, 32)
    k = (centres[torch.arange(4096) // 64 % 32] + 0.5 * torch.randn(4096, 1, 32))[torch.randperm(4096)]
    q = (centres[torch.randint(32, (4096,))] + 0.5 * torch.randn(4096, 1, 32)).expand(-1, 2, -1).contiguous()
    found, scanned = searched(options, q, k)
    assert found > 0.9
    assert scanned < 0.25


def test_queries_unlike_the_keys_need_links_made_from_queries() -> None:
    """At an equal number of keys scanned."""
    q, k = far(4096, 64)
    options = replace(WAITING, degree=16, top_k=20, lag=64)
    found, scanned = searched(replace(options, queries=256, beam=32), q, k)
    by_keys = [searched(replace(options, queries=0, beam=beam), q, k) for beam in (24, 32, 48, 64, 96, 128)]
    at_least_as_many = [other for other, share in by_keys if share >= scanned]
    assert at_least_as_many, "no beam scanned as much"
    assert found > at_least_as_many[0] + 0.03, (found, scanned, by_keys)
    assert found > 0.9
    assert scanned < 0.25


def decode(cache: PagedCache, texts: list[Text], q: Tensor, k: Tensor) -> Context:
    """One token of each sequence."""
    for text in texts:
        cache.reserve(text.sequence, text.length + 1)
    step = cache.decode([Span(text.sequence, text.length, 1) for text in texts])
    run(cache, step, q, k)
    for text, key in zip(texts, k, strict=True):
        text.keys.append(key[None])
    return cache.context(0, step)


@pytest.mark.parametrize("wait", [True, False])
def test_generated_tokens_are_found_at_once(wait: bool) -> None:
    cache, index, text = opened(replace(WAITING, wait=wait, lag=16, beam=64), frames=128)
    text.step(128, torch.randn(128, HEADS, 16), 0.1 * torch.randn(128, 2, 16))
    for length in range(128, 240):
        planted = length % 16 == 3
        key = torch.full((1, 2, 16), 4.0) if planted else 0.1 * torch.randn(1, 2, 16)
        context = decode(cache, [text], q := torch.ones(1, HEADS, 16), key)
        heavy = [token // 4 for token in range(131, length + 1, 16)]
        found = index.masses(q, context)[0].topk(len(heavy), -1).indices.sort(-1).values
        assert found.tolist() == [heavy] * HEADS
    if wait:
        assert len(index.entries) > 1, "the graph has not followed"


def test_a_row_alone_and_in_a_batch_has_the_same_bits() -> None:
    cache, index, first = opened(frames=256)
    texts = [first, *(Text(cache, cache.open(WAITING)) for _ in range(2))]
    for text, length in zip(texts, (120, 41, 9), strict=True):
        text.step(length, torch.randn(length, HEADS, 16), torch.randn(length, 2, 16))
    q, k = torch.randn(3, HEADS, 16), torch.randn(3, 2, 16)
    context = decode(cache, texts, q, k)
    together = index.masses(q, context)
    for row, text in enumerate(texts):
        step = cache.decode([Span(text.sequence, text.length - 1, 1)])
        alone = index.masses(q[row : row + 1], cache.context(0, step))
        assert torch.equal(alone[0], together[row, :, : step.max_pages])


def test_a_shared_prefix_shares_its_graph() -> None:
    cache, index, first = opened(frames=128)
    q, k = torch.randn(96, HEADS, 16), torch.randn(96, 2, 16)
    first.step(96, q, k)
    decode_q = torch.randn(1, HEADS, 16)
    index.masses(decode_q, decode(cache, [first], decode_q, torch.randn(1, 2, 16)))
    assert len(index.entries) == 1
    cache.keep(first.sequence, [bytes([page]) for page in range(24)])
    second = Text(cache, cache.open(WAITING), [k])
    cache.share(second.sequence, cache.prefix.match([bytes([page]) for page in range(24)]))
    index.masses(decode_q, decode(cache, [second], decode_q, torch.randn(1, 2, 16)))
    assert len(index.entries) == 1


def test_a_failing_build_is_told_and_only_its_own_pages_are_answered_by_codes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(source: build.Source, stopped: build.Stopped) -> KeyGraph:
        raise RuntimeError("out of luck")

    spec = replace(WAITING, wait=False)
    cache, index, text = opened(spec)
    with monkeypatch.context() as patch:
        patch.setattr("keysift.kvcache.index.graph.graphs.build", fail)
        text.step(96, torch.randn(96, HEADS, 16), torch.randn(96, 2, 16))
        (job,) = jobs(index)
        assert job.done.wait(60)
    for _ in range(2):
        q = torch.randn(1, HEADS, 16)
        context = decode(cache, [text], q, torch.randn(1, 2, 16))
        assert index.masses(q, context).equal(CodeIndex().masses(q, context))
    other = Text(cache, cache.open(spec))
    other.step(96, torch.randn(96, HEADS, 16), torch.randn(96, 2, 16))
    assert all(job.done.wait(60) for job in jobs(index))
    assert [job.graph is None for job in jobs(index)] == [True, False]
    assert [record.message for record in caplog.records if record.exc_info] == [
        "a graph could not be built; the codes go on answering"
    ]


@pytest.mark.parametrize(("limit", "known"), [(None, 0), (10_000, 0), (BLOCK_BYTES, 24), (0, 24)])
def test_a_prefix_without_queries_is_used_where_none_can_be_kept(limit: int | None, known: int) -> None:
    cache, _, text = opened()
    cache.indexes.room.limit = 0
    text.step(96, torch.randn(96, HEADS, 16), torch.randn(96, 2, 16))
    names = [bytes([page]) for page in range(24)]
    cache.keep(text.sequence, names)
    cache.indexes.room.limit = limit
    assert len(cache.match(names, WAITING)) == known


def test_whatever_a_build_raises_the_next_one_is_built() -> None:
    def fail(stopped: build.Stopped) -> KeyGraph:
        raise SystemExit

    def succeed(stopped: build.Stopped) -> KeyGraph:
        return KeyGraph(torch.empty(1, 0, 1), torch.empty(1, 0), 0)

    jobs = [Job(fail), Job(succeed)]
    for job in jobs:
        submit(job)
    assert jobs[1].done.wait(20)
    assert [job.graph is None for job in jobs] == [True, False]


def endless_builds(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Builds that go on until they are stopped, and an event that the first one sets."""
    begun = threading.Event()

    def endless(source: build.Source, stopped: build.Stopped) -> KeyGraph:
        begun.set()
        while not stopped():
            threading.Event().wait(0.001)
        raise build.Cancelled

    monkeypatch.setattr("keysift.kvcache.index.graph.graphs.build", endless)
    return begun


@pytest.mark.parametrize("page", [0, 10])
def test_a_build_ends_when_any_of_its_pages_is_written_anew(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    endless_builds(monkeypatch)
    cache, index, text = opened(replace(WAITING, wait=False))
    text.step(96, torch.randn(96, HEADS, 16), torch.randn(96, 2, 16))
    (job,) = jobs(index)
    cache.indexes.begin([cache._frames[text.sequence][page]])
    assert job.done.wait(60)
    assert len(index.entries) == 0


def test_a_build_that_is_waited_for_fails_its_own_step_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, index, text = opened()
    text.step(96, torch.randn(96, HEADS, 16), torch.randn(96, 2, 16))
    q = torch.randn(1, HEADS, 16)
    context = decode(cache, [text], q, torch.randn(1, 2, 16))
    before = index.entries.bytes
    with monkeypatch.context() as patch:
        patch.setattr("keysift.kvcache.index.graph.graphs.build", lambda source, stopped: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            index.masses(q, context)
    assert index.entries.bytes == before
    index.masses(q, context)
    assert [job.graph is None for job in jobs(index)] == [False]


def test_a_build_in_progress_is_dropped_when_its_frames_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(source: build.Source, stopped: build.Stopped) -> KeyGraph:
        begun.set()
        assert go.wait(60)
        return build.build(source, stopped)

    monkeypatch.setattr("keysift.kvcache.index.graph.graphs.build", slow)
    spec = replace(WAITING, wait=False)
    cache, index, text = opened(spec, frames=26)
    text.step(96, torch.randn(96, HEADS, 16), torch.randn(96, 2, 16))
    (job,) = jobs(index)
    assert begun.wait(60)
    cache.release(text.sequence)
    other = Text(cache, cache.open())
    cache.reserve(other.sequence, 1)  # before anything is written
    assert not jobs(index)
    go.set()
    assert job.done.wait(60)
    assert len(index.entries) == 0
    assert index.entries._graphs.bytes == 0


def test_a_build_that_nobody_waits_for_does_not_begin() -> None:
    began = []
    job = Job(lambda stopped: began.append(1))  # type: ignore[arg-type, return-value, func-returns-value]
    job.cancel()
    job.run()
    assert not began
    assert job.done.is_set()


def test_the_process_stops_a_build_before_it_ends() -> None:
    """And begins no other."""
    code = """
import subprocess
import sys
import threading
import torch
from keysift.kvcache.index.graph.build import Cancelled
from keysift.kvcache.index.graph.worker import Job, submit, submit
begun, jobs = threading.Event(), []
def work(stopped):
    begun.set()
    while not stopped():
        torch.randn(100_000).sort()  # comes back from C++ all the time, where the end of the interpreter would stop it
    print("stopped", flush=True)
    raise Cancelled
for _ in range(3):
    jobs.append(Job(work))
    submit(jobs[-1])
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


def test_a_build_stops_between_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []

    def counted(q: Tensor, *args: int, threads: int) -> Tensor:
        pieces.append(q.shape[1])
        return nearest_keys(q, *args, threads=threads)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "nearest_keys", counted)
    table = torch.arange(32, dtype=torch.int32)[None]
    source = build.Source(torch.randn(600, 2, 16), torch.randn(32, 1, 4, 16), table, 4, 8, 1)
    graph = build.build(source)
    whole, pieces = pieces, []
    assert whole == [build.PIECE] * 9 + [1200 - 9 * build.PIECE]
    job = Job(lambda stopped: build.build(source, lambda: len(pieces) == 2))
    job.run()
    assert pieces == whole[:2]
    assert job.graph is None
    assert job.done.is_set()
    monkeypatch.setattr(build, "PIECE", 10**6)
    again = build.build(source)
    assert torch.equal(graph.links, again.links)
    assert torch.equal(graph.points, again.points)


def test_closing_the_cache_stops_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = endless_builds(monkeypatch)
    cache, index, text = opened(replace(WAITING, wait=False))
    text.step(96, torch.randn(96, HEADS, 16), torch.randn(96, 2, 16))
    (job,) = jobs(index)
    assert begun.wait(60)
    cache.close()
    assert job.done.wait(60)
    assert job.graph is None


def test_the_background_builds_what_waiting_builds() -> None:
    found = []
    for wait in (True, False):
        torch.manual_seed(1)
        cache, index, text = opened(replace(WAITING, wait=wait))
        step = text.step(128, q := torch.randn(128, HEADS, 16), torch.randn(128, 2, 16))
        assert all(job.done.wait(60) for job in jobs(index))
        index.masses(q, cache.context(0, step))
        q = torch.randn(1, HEADS, 16)
        found.append(index.masses(q, decode(cache, [text], q, torch.randn(1, 2, 16))))
        assert len(index.entries) == 1
    assert torch.equal(*found)


SCHEDULE = st.lists(
    st.one_of(
        st.tuples(st.just("prompt"), st.integers(1, 40)),
        st.tuples(st.just("token"), st.integers(1, 3)),
        st.tuples(st.just("release"), st.integers(0, 2)),
        st.tuples(st.just("share"), st.integers(0, 2)),
        st.tuples(st.just("rewind"), st.integers(1, 30)),
    ),
    min_size=3,
    max_size=12,
)


@settings(max_examples=20)
@given(SCHEDULE, st.booleans(), st.integers(0, 2**31))
def test_nothing_stale_is_found(schedule: list[tuple[str, int]], wait: bool, seed: int) -> None:
    """A beam that holds all keys finds the best ones whatever the graph: exactly those of a fresh index."""
    torch.manual_seed(seed)
    spec = replace(WAITING, beam=256, queries=16, wait=wait)
    cache, index, text = opened(spec, frames=48)
    texts, name = [text], 0
    for what, number in schedule:
        which = texts[number % len(texts)]
        if what == "prompt" and which.length + number <= 60:
            which.step(number, integers(number, HEADS, 16), integers(number, 2, 16))
        elif what == "token" and (live := [text for text in texts if 0 < text.length < 60]):
            for _ in range(number):
                decode(cache, live, integers(len(live), HEADS, 16), integers(len(live), 2, 16))
        elif what == "release":
            cache.release(which.sequence)
            texts.remove(which)
            texts += [Text(cache, cache.open(spec))] if not texts else []
        elif what == "share" and len(texts) < 3 and (pages := which.length // 4):
            names, name = [bytes([name, page]) for page in range(pages)], name + 1
            cache.keep(which.sequence, names)
            texts.append(Text(cache, cache.open(spec), [torch.cat(which.keys)[: 4 * pages]]))
            cache.share(texts[-1].sequence, cache._frames[which.sequence][:pages])
        elif what == "rewind" and which.length - number > 0 and len(texts) == 1:
            which.keys = [torch.cat(which.keys)[: which.length - number]]
        check(cache, index, spec, texts)


def check(cache: PagedCache, index: GraphIndex, spec: Graph, texts: list[Text]) -> None:
    live = [text for text in texts if text.length]
    if not live:
        return
    q = integers(len(live), HEADS, 16)
    step = cache.decode(
        [Span(text.sequence, text.length - 1, 1) for text in live]
    )  # computed again, nothing is written
    context = cache.context(0, replace(step, filled=step.filled[:0]))
    hits, fresh = search(index, q, context), search(replace(spec, wait=True).make(SPEC, Room()), q, context)
    assert torch.equal(hits.keys, fresh.keys)
    assert torch.equal(hits.scores, fresh.scores)
    for row, text in enumerate(live):
        keys = torch.cat(text.keys)
        scores = exact(q[row : row + 1], keys, step.starts[row : row + 1], spec, 4) / 4
        best = scores.sort(dim=-1, descending=True, stable=True)
        width = min(spec.top_k, len(keys))
        assert torch.equal(hits.scores[row, :, :width], best.values[0, :, :width])
