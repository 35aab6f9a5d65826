"""State of a running request. Host values only."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from keysift.attention import Coverage, Dense, Locality, Reads, Strategy
from keysift.attention.failure import Blame
from keysift.kvcache import PageKeys, Phase, Traffic
from keysift.kvcache.index import IndexSpec

from ..request import PrefillProgress, PromptInfo, Request, Sparsity, Timings, Usage


class Statistics(NamedTuple):
    """Statistics of one step of one sequence."""

    reads: Reads
    coverage: Coverage
    traffic: Traffic
    locality: Locality


class Blocked(NamedTuple):
    """State in which a sequence found too few pages: until one of both changes, it finds too few again."""

    free: int
    """Pages that were free."""
    missing: bytes | None
    """Key of its first page that was not cached; None: all were."""


class Made(NamedTuple):
    """Statistics of the steps that computed a prefix, kept with its pages."""

    reads: Reads
    coverage: Coverage


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one request, its progress in the cache, and its timestamps and statistics."""

    request: Request
    strategy: Strategy
    max_new_tokens: int
    """The request's own limit or what `max_model_len` leaves, whichever is less."""
    keys: PageKeys | None = None
    """Keys of its pages in the prefix cache; None: it neither reads nor fills that cache."""
    reproducible: bool = False
    """Its bits are those of the prompt computed in whole chunks, then token by token."""
    prompt_strategy: Strategy = field(init=False)
    """Strategy of the whole prompt; where it is dense, so is every chunk."""
    name: str = field(init=False)
    """The strategy's name, asked once as the next two: what its own code raises then concerns nobody else."""
    remembers: bool = field(init=False)
    """`Strategy.remembers`."""
    rows_at_the_end: int = field(init=False)
    """`Strategy.rows_at_the_end` of the prompt's strategy."""
    serial: int = 0
    """Orders requests that arrived at the same time."""
    waited: int = 0
    """Steps that it has waited for pages, or for its prompt's turn, until `since`."""
    since: int | None = None
    """Number of the scheduler's step from which on it waits; None: it does not."""
    blocked: Blocked | None = None
    """Why it was not admitted; None: it was not tried since it waits."""
    tokens: list[int] = field(default_factory=list)
    handle: int | None = None
    """Number of the sequence in the cache while it holds pages."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    cached: int = 0
    """Prompt tokens that the prefix cache held at the first admission."""
    kept: int = 0
    """Full pages added to the prefix cache."""
    reused: Made = field(default_factory=lambda: Made(Reads(), Coverage()))
    """Statistics of the steps that computed the cached prefix, in whichever request that was."""
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    reads: dict[Phase, Reads] = field(default_factory=lambda: dict.fromkeys(Phase, Reads()))
    coverage: dict[Phase, Coverage] = field(default_factory=lambda: dict.fromkeys(Phase, Coverage()))
    traffic: dict[Phase, Traffic] = field(default_factory=lambda: dict.fromkeys(Phase, Traffic()))
    locality: Locality = field(default_factory=Locality)
    chose: set[Phase] = field(default_factory=set)
    """Phases in which the strategy chose pages."""
    fell_back: set[Phase] = field(default_factory=set)
    """Phases with a step that ran dense because choosing was not worth it."""
    preemptions: int = 0
    reported: int = -1
    """Prompt tokens of the last progress report; -1: none yet."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.prompt_strategy = self.strategy.at(Phase.PREFILL, self.prompt_len, self.prompt_len)
        self.name = self.strategy.name
        self.remembers = self.strategy.remembers
        self.rows_at_the_end = self.prompt_strategy.rows_at_the_end

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def index_specs(self) -> tuple[IndexSpec, ...]:
        """The index that its tokens search; none if all of them are so early that they run dense."""
        spec = self.strategy.index_spec()
        dense = isinstance(self.strategy.at(Phase.DECODE, self.prompt_len + self.max_new_tokens, 1), Dense)
        return () if spec is None or dense else (spec,)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Known tokens that are not in the cache yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def in_chunks(self) -> int:
        """Tokens that are computed in chunks: those of the prompt; the others are decoded one by one.

        After a preemption the generated tokens that were computed before are in chunks too, if all attention was exact;
        otherwise they are decoded again, so that they read the same pages. The last one was never computed, and what
        it reads is the strategy's choice.
        """
        return len(self.tokens) - 1 if self.exact and self.num_generated else self.prompt_len

    @property
    def phase(self) -> Phase:
        return Phase.PREFILL if self.computed < self.in_chunks else Phase.DECODE

    @property
    def order(self) -> tuple[int, float, int]:
        """Sort key of requests that have not waited long: smaller runs first."""
        return self.request.priority, self.request.arrival, self.serial

    @property
    def dense(self) -> bool:
        """The prompt reads its whole context, however it is cut into chunks."""
        return isinstance(self.prompt_strategy, Dense)

    @property
    def any_cut(self) -> bool:
        """The prompt may be cut into chunks anywhere, as far as rounding does not matter."""
        return self.dense and not self.reproducible

    @property
    def exact(self) -> bool:
        """The prompt may be cut anywhere, and every token so far read its whole context and left no state to the next.

        So generated tokens may be computed in chunks, and their pages be those of a prompt.
        """
        if Phase.DECODE in self.chose and self.remembers:
            return False
        return self.any_cut and all(reads.chosen == reads.possible for reads in self.reads.values())

    def runs(self, phase: Phase, queries: int) -> Strategy:
        """Strategy of the next tokens: the part for the phase, or dense where choosing is not worth it.

        All chunks after a dense prompt are dense too, however long the sequence has grown: so they were before a
        preemption. Raises `StrategyFailure` for what the strategy's own code raises.
        """
        if phase is Phase.PREFILL and self.dense:
            return self.prompt_strategy
        with Blame(self.strategy, "at"):
            chosen = self.strategy.at(phase, self.computed + queries, queries)
            hash(chosen)  # batches are grouped by it
        return chosen

    def page_keys(self) -> list[bytes]:
        """Keys of the full pages that other sequences may share; the scheduler uses fewer for a sparse prompt.

        Pages of generated tokens are included only while all attention is exact: otherwise a prompt of the same tokens
        would get other content than its own prefill yields.
        """
        if self.keys is None:
            return []
        return self.keys.upto(self.tokens if self.exact else self.request.prompt)

    def start(self, now: float) -> None:
        """Record the start of a step; only the first one counts."""
        if self.started is None:
            self.started = now
            self.cached = self.computed

    def count(self, phase: Phase, step: Statistics) -> None:
        """Add a step's statistics."""
        self.reads[phase] += step.reads
        self.coverage[phase] += step.coverage
        self.traffic[phase] += step.traffic
        self.locality += step.locality

    def made(self) -> Made:
        """Statistics of all steps that computed what the sequence holds, those of its cached prefix included."""
        return Made(sum(self.reads.values(), self.reused.reads), sum(self.coverage.values(), self.reused.coverage))

    def append(self, token: int, now: float) -> None:
        self.tokens.append(token)
        self.first_token = self.first_token or now
        self.last_token = now

    def prompt_info(self) -> PromptInfo:
        return PromptInfo(self.request.request_id, self.prompt_len, self.cached, self.name, self.timings().queue_ms)

    def progress(self) -> PrefillProgress:
        processed = min(self.computed, self.prompt_len)
        return PrefillProgress(self.request.request_id, self.prompt_len, self.cached, processed)

    def usage(self) -> Usage:
        return Usage(self.prompt_len, self.num_generated, self.cached)

    def timings(self) -> Timings:
        now = time.monotonic()
        started = self.started or now
        first = self.first_token or now
        decode = 1e3 * ((self.last_token or first) - first)
        return Timings(
            queue_ms=1e3 * (started - self.request.arrival),
            prefill_ms=1e3 * (first - started),
            ttft_ms=1e3 * (first - self.request.arrival),
            decode_ms=decode,
            tpot_ms=decode / (self.num_generated - 1) if self.num_generated > 1 else 0.0,
        )

    def sparsity(self) -> Sparsity:
        """Statistics of the attention. Coverage is that of the phases in which the strategy chose pages.

        Within such a phase, steps and layers that ran dense count as 1. A phase that was dense throughout is left out,
        so that many generated tokens cannot hide the loss of their prompt. A cached prefix counts as it was computed,
        but for bytes, which are those of this request's own steps.
        """
        prefill, decode = self.reads[Phase.PREFILL], self.reads[Phase.DECODE]
        prompt, coverage = self.reused.reads + prefill, {**self.coverage}
        coverage[Phase.PREFILL] = self.reused.coverage + coverage[Phase.PREFILL]
        prefill_traffic, decode_traffic = self.traffic[Phase.PREFILL], self.traffic[Phase.DECODE]
        chose = sum((each for each in coverage.values() if each.chose), Coverage())
        return Sparsity(
            strategy=self.name,
            prefill_density=prompt.density,
            decode_density=decode.density,
            coverage=chose.mean,
            dense_fallback=bool(self.fell_back - self.chose),
            kv_bytes_read=prefill.bytes + decode.bytes,
            kv_bytes_moved=prefill_traffic.fetched + decode_traffic.fetched,
            coverage_min=chose.least,
            widened=chose.widened_share,
            estimated=chose.estimated_share,
            dropped_bound=chose.dropped_bound,
            kv_bytes_written=prefill_traffic.written + decode_traffic.written,
            decode_bytes_moved=decode_traffic.fetched,
            kv_hits=decode_traffic.hits,
            kv_misses=decode_traffic.misses,
            kv_overlap=self.locality.mean_overlap,
            bound_exceeded=self.locality.bound_exceeded_share,
        )
