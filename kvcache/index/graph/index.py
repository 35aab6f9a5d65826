"""Graphs over the keys, built from the prompt's own queries: RetrievalAttention's index (arXiv 2409.10516)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...ops.page_masses import code_masses
from ...step import Phase
from ..blocks import Blocks
from .build import Source, build, extend
from .ops import Found, KeyGraph, Reach, search_graphs
from .queries import Kept
from .worker import Job, Worker

if TYPE_CHECKING:
    from ...context import Context
    from ...spec import CacheSpec


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph for each KV head of each layer, walked best first; what it does not cover yet is scanned."""

    scans: ClassVar[bool] = True
    host: ClassVar[bool] = True

    degree: int = 32
    """Links of a key, besides those to its neighbours in the sequence."""
    beam: int = 128
    """Keys that a walk keeps; more find more and scan more."""
    top_k: int = 100
    """Hits of each query head."""
    queries: int = 512
    """Most tokens of a prompt whose queries train a graph; 0: keys train it, and queries find less."""
    lag: int = 1024
    """Tokens of full pages that may be scanned before a graph is built or extended for them."""
    sink: int = 64
    """First tokens, which are scanned and are no hits, as every row reads them anyway."""
    window: int = 256
    """Last tokens, which are scanned and are no hits."""
    wait: bool = False
    """Build a graph before the first search; otherwise one thread builds it, and masses come from codes until then."""

    def make(self, spec: CacheSpec) -> GraphIndex:
        return GraphIndex(self)


@dataclass(slots=True)
class _State:
    """State of one layer of one open sequence."""

    held: Sequence[int]
    """The sequence's frames: the same list object as long as it is open, so another one means another sequence."""
    kept: Kept
    graph: KeyGraph | None = None
    covered: int = 0
    """Pages of that graph."""
    age: int = -1
    """`GraphIndex._age` at the last lookup."""


class GraphIndex:
    """An index of key graphs, see `Graph`.

    A graph covers a run of full pages; sequences that share them share it. Everything but building runs in the
    caller's thread.
    """

    estimates_mass: ClassVar[bool] = False

    def __init__(self, options: Graph) -> None:
        self.options = options
        self.graphs: Blocks[KeyGraph] = Blocks()
        self._lengths: dict[int, set[int]] = {}
        self._states: dict[tuple[int, int], _State] = {}
        self._jobs: dict[tuple[int, tuple[int, ...]], Job] = {}
        self._broken: set[int] = set()  # layers whose graphs cannot be built
        self._worker = Worker()
        self._age = 0

    def observe(self, q: Tensor, context: Context) -> None:
        step = context.step
        if context.spec.window(context.layer):
            return
        first = 0
        for row, span in enumerate(step.spans):
            self._of(context, row).kept.add(q[first : first + span.length], span.start)
            first += span.length
        if step.phase is Phase.PREFILL and not step.rows_left and not self._waits(context):
            self._prepare(context, 0)

    def forget(self, frames: Sequence[int]) -> None:
        self._collect()
        if not frames:
            return
        gone = set(frames)
        for key in [key for key, job in self._jobs.items() if not job.frames.isdisjoint(gone)]:
            self._jobs.pop(key).cancelled = True
        before = len(self.graphs)
        self.graphs.forget(frames)
        self._age += len(self.graphs) != before

    def masses(self, q: Tensor, context: Context) -> Tensor:
        starts, graphs = context.step.starts, self._graphs(context)
        ends = torch.tensor([0 if graph is None else graph.tokens for graph in graphs], device=starts.device)
        ready = (ends > 0) | (starts <= 2 * self.options.lag)
        if self._waits(context) or not context.spec.code_bits or bool(ready.all()):  # a CPU index: no wait for a device
            return self._search(q, context, graphs, starts).masses
        found = self._search(q, context, graphs, starts.where(ready, -1)).masses
        return torch.where(ready[:, None, None], found, self._by_codes(q, context))

    def _graphs(self, context: Context) -> list[KeyGraph | None]:
        """The graph of each row; all rows of a prompt chunk belong to one sequence."""
        graphs = [self._prepare(context, row) for row in range(len(context.step.spans))]
        return graphs if len(graphs) > 1 else graphs * context.step.num_rows

    def _search(self, q: Tensor, context: Context, graphs: Sequence[KeyGraph | None], positions: Tensor) -> Found:
        own, frames = self.options, context.fetch(context.all())
        reach = Reach(own.degree, own.beam, own.top_k, own.sink, own.window)
        return search_graphs(q, frames.k, frames.table, positions, graphs, reach, context.spec.softmax_scale)

    def _by_codes(self, q: Tensor, context: Context) -> Tensor:
        codes, step = context.tier.codes(context.layer), context.step
        scale = context.spec.softmax_scale
        return code_masses(q, *context.own_page(), codes, step.table, step.starts, scale=scale, candidates=512)

    def _waits(self, context: Context) -> bool:
        """True if graphs are built before the search, as always on a tier whose pages move."""
        return self.options.wait or not context.tier.steady

    def _of(self, context: Context, row: int) -> _State:
        span, held = context.step.spans[row], context.step.held[row]
        state = self._states.get((span.sequence, context.layer))
        if state is None or state.held is not held:
            state = self._states[span.sequence, context.layer] = _State(held, Kept(self.options.queries))
        return state

    def _prepare(self, context: Context, row: int) -> KeyGraph | None:
        """The row's graph, if any; starts to build, or builds, one when more than `lag` tokens lie after it."""
        self._collect()
        state, size = self._of(context, row), context.spec.page_size
        pages = context.step.spans[row].stop // size
        graph = self._lookup(state, context.layer, pages)
        covered = 0 if graph is None else graph.tokens
        if pages * size - max(covered, self.options.sink) <= self.options.lag or context.layer in self._broken:
            return graph
        frames = tuple(state.held[:pages])
        if self._builds(context.layer, frames):
            return graph
        work = self._work(context, state, graph if 2 * covered >= pages * size else None, frames)
        if not self._waits(context):
            self._submit(context.layer, frames, work)
            return graph
        self._put(context.layer, frames, work())
        return self._lookup(state, context.layer, pages)

    def _builds(self, layer: int, frames: tuple[int, ...]) -> bool:
        """True if a graph over these frames, or over the first of them, is being built."""
        return any(of == layer and held == frames[: len(held)] for of, held in self._jobs)

    def _work(
        self, context: Context, state: _State, graph: KeyGraph | None, frames: tuple[int, ...]
    ) -> partial[KeyGraph]:
        size = context.spec.page_size
        k = context.fetch(context.all()).k  # may fail, so the queries are taken after it
        source = Source(
            state.kept.take(0 if graph is None else graph.tokens),
            k,
            frames,
            -(-self.options.sink // size) * size,
            self.options.degree,
            0 if self._waits(context) else 1,
        )
        return partial(build, source) if graph is None else partial(extend, graph, source)

    def _submit(self, layer: int, frames: tuple[int, ...], work: partial[KeyGraph]) -> None:
        job = self._jobs[layer, frames] = Job(frames, work)
        self._worker.submit(job)

    def _collect(self) -> None:
        """Store the graphs that the worker has finished."""
        for key in [key for key, job in self._jobs.items() if job.done.is_set()]:
            job = self._jobs.pop(key)
            if job.graph is None:
                self._broken.add(key[0])
            else:
                self._put(*key, job.graph)

    def _put(self, layer: int, frames: tuple[int, ...], graph: KeyGraph) -> None:
        self.graphs.put(layer, frames, graph)
        self._lengths.setdefault(layer, set()).add(len(frames))
        self._age += 1

    def _lookup(self, state: _State, layer: int, pages: int) -> KeyGraph | None:
        """The longest graph over the sequence's full pages; looked up again when graphs or the sequence changed."""
        if state.age != self._age or pages < state.covered:
            state.age, state.graph, state.covered = self._age, None, 0
            for count in sorted((count for count in self._lengths.get(layer, ()) if count <= pages), reverse=True):
                state.graph = self.graphs.get(layer, tuple(state.held[:count]))
                if state.graph is not None:
                    state.covered = count
                    break
        return state.graph
