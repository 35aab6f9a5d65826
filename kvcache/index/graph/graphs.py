"""The graphs that are kept: each a function of the tokens under it, whichever sequence asked for it and when."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from torch import Tensor

from ...step import Phase
from ..room import Block, Blocks, Room
from .build import Source, build, graph_bytes
from .ops import KeyGraph
from .queries import KeptQueries
from .worker import Job, submit

if TYPE_CHECKING:
    from ...contents import Contents
    from ...context import Context
    from ...spec import CacheSpec
    from ...step import Span


@dataclass(frozen=True, slots=True)
class Sizes:
    """All that graphs depend on besides tokens; see `Graph`."""

    degree: int
    queries: int
    lag: int
    sink: int
    wait: bool


@dataclass(frozen=True, slots=True)
class _View:
    """The graphs of a step, the same in all layers."""

    spans: tuple[Span, ...]
    version: int
    """Of the blocks."""
    blocks: list[Block[Job] | None]
    """Of each span; None: its sequence is too short."""


class Graphs:
    """Graphs over the first pages of sequences, by their contents, so that a shared prefix shares them.

    A graph ends at a multiple of `lag` tokens, half of it to one and a half before the token that searches, and is made
    of the keys before that end and of queries kept with their pages. So it is the same for a prompt that is computed as
    for one that is found in the prefix cache, for one that was preempted, and for others that begin alike.
    """

    def __init__(self, spec: CacheSpec, room: Room, sizes: Sizes, others: Sequence[Graphs] = ()) -> None:
        """The training queries are shared with those of the others that take the same."""
        self.sizes = sizes
        self._spec = spec
        self._grain = -(-sizes.lag // spec.page_size)
        alike = (other._queries for other in others if other._taken == self._taken)
        self._queries: KeptQueries = next(alike, None) or KeptQueries(spec, room, sizes.queries, self._grain)
        self._queries.users.add(self)
        self._graphs: Blocks[Job] = Blocks(room, Job.cancel)
        self._building: list[Block[Job]] = []
        self._view: _View | None = None

    def __len__(self) -> int:
        """Runs of pages that have graphs."""
        return len(self._graphs)

    @property
    def _taken(self) -> tuple[int, int]:
        """All that the choice of training queries depends on."""
        return self.sizes.queries, self._grain

    @property
    def bytes(self) -> int:
        return self._graphs.bytes + self._queries.bytes

    def observe(self, q: Tensor, context: Context, rows: Sequence[int]) -> None:
        step = context.step
        if context.spec.window(context.layer):
            return
        firsts = [0, *accumulate(span.length for span in step.spans)]
        for row in rows:
            self._queries.add(q, context, row, firsts[row])
        if step.phase is Phase.PREFILL and not step.rows_left and not self.waits(context):
            self.of(context)

    def known(self, pages: Sequence[Contents]) -> int:
        return self._queries.known(pages)

    def forget(self, frames: Set[int]) -> None:
        self._view = None
        self._graphs.forget(frames)
        self._building = [
            block for block in self._building if not all(job.done.is_set() for job in block.parts.values())
        ]
        for block in self._building:  # they read keys of all their pages
            if block.contents.meets(frames):
                block.drop()

    def claim(self, frames: Set[int]) -> None:
        self.forget(frames)
        self._queries.claim(frames)

    def clear(self) -> None:
        self._view, self._building = None, []
        self._graphs.clear()
        self._queries.leave(self)

    def waits(self, context: Context) -> bool:
        """True if graphs are built before the search, as always on a tier whose pages move."""
        return self.sizes.wait or not context.tier.steady

    def pages(self, tokens: int) -> int:
        """Pages of the graph that is searched after so many tokens; 0: none is."""
        pages = max(tokens - self.sizes.lag // 2, 0) // self._spec.page_size // self._grain * self._grain
        return pages if pages >= 2 * self._grain and pages * self._spec.page_size > self.sizes.sink else 0

    def of(self, context: Context) -> list[KeyGraph | None]:
        """The graph of each span; builds those that the layer lacks, or begins to.

        None: its sequence is too short, the graph is not built yet or could not be, or there is no room for it.
        """
        blocks = self._view_of(context).blocks
        return [None if block is None else self._graph(context, row, block) for row, block in enumerate(blocks)]

    def _view_of(self, context: Context) -> _View:
        step, view = context.step, self._view
        if view is None or view.spans is not step.spans or view.version != self._graphs.version:
            counts = [self.pages(span.stop) for span in step.spans]
            blocks = [
                self._graphs.at(step.contents(row, 0, count)) if count else None for row, count in enumerate(counts)
            ]
            self._view = view = _View(step.spans, self._graphs.version, blocks)
        return view

    def _graph(self, context: Context, row: int, block: Block[Job]) -> KeyGraph | None:
        if (job := block.parts.get(context.layer)) is not None:
            return job.graph
        size = graph_bytes(len(block.contents) * self._spec.page_size, self.sizes.degree, self._spec.num_kv_heads)
        if not self._graphs.room.make(size + block.least):
            return None
        job = Job(self._work(context, row, len(block.contents)))
        if self.waits(context):
            job.run()
        else:
            submit(job)
            self._building.append(block)
        block.put(context.layer, job, size)
        return job.graph

    def _work(self, context: Context, row: int, pages: int) -> partial[KeyGraph]:
        frames = context.fetch(context.all())
        queries, size = self._queries.training(context, row, pages), self._spec.page_size
        first, threads = -(-self.sizes.sink // size) * size, 0 if self.waits(context) else 1
        return partial(
            build, Source(queries, frames.k, frames.table[row, :, :pages], first, self.sizes.degree, threads)
        )
