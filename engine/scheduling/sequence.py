"""A request while it runs. Host values only."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from keysift.attention import Coverage, Dense, Locality, Reads, Strategy
from keysift.kvcache import PageKeys, Phase, Traffic

from ..request import PrefillProgress, PromptInfo, Request, Sparsity, Timings, Usage


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one request, how many of them are in the cache, and when what happened."""

    request: Request
    strategy: Strategy
    max_new_tokens: int
    """The request's own limit or what the model's length leaves, whichever is less."""
    keys: PageKeys | None = None
    """Names of its pages in the prefix cache; None: it neither uses nor feeds that cache."""
    prompt_strategy: Strategy = field(init=False)
    """What its prompt runs under, taken as a whole; where that is dense, each of its chunks is."""
    serial: int = 0
    """Tells requests apart that arrived at the same time."""
    tokens: list[int] = field(default_factory=list)
    handle: int | None = None
    """Its number in the cache while it holds pages."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    cached: int = 0
    """Prompt tokens that were there when it was first admitted."""
    kept: int = 0
    """Full pages offered to the prefix cache."""
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    reads: dict[Phase, Reads] = field(default_factory=lambda: dict.fromkeys(Phase, Reads()))
    coverage: dict[Phase, Coverage] = field(default_factory=lambda: dict.fromkeys(Phase, Coverage()))
    traffic: dict[Phase, Traffic] = field(default_factory=lambda: dict.fromkeys(Phase, Traffic()))
    locality: Locality = field(default_factory=Locality)
    chose: set[Phase] = field(default_factory=set)
    """Phases in which the strategy has chosen pages."""
    fell_back: set[Phase] = field(default_factory=set)
    """Phases in which some step ran dense because choosing was not worth it."""
    preemptions: int = 0
    reported: int = -1
    """Prompt tokens of the last progress report; -1: nothing was reported yet."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.prompt_strategy = self.strategy.at(Phase.PREFILL, self.prompt_len, self.prompt_len)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Known tokens that are not in the cache yet: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def in_chunks(self) -> int:
        """Tokens that are computed in chunks: those of the prompt, the others one by one.

        After a preemption generated tokens may come in chunks too, if everything was read the first time; otherwise
        they are decoded once more, so that they find what they found.
        """
        return len(self.tokens) if self.exact else self.prompt_len

    @property
    def phase(self) -> Phase:
        alone = self.remaining == 1 and self.num_generated > 0
        return Phase.PREFILL if self.computed < self.in_chunks and not alone else Phase.DECODE

    @property
    def order(self) -> tuple[int, float, int]:
        """Who runs first: smaller is earlier."""
        return self.request.priority, self.request.arrival, self.serial

    @property
    def dense(self) -> bool:
        """Its prompt reads everything, however it is cut into chunks."""
        return isinstance(self.prompt_strategy, Dense)

    @property
    def exact(self) -> bool:
        """Its prompt is dense, and every token so far has read all of its context and left nothing to the next."""
        if Phase.DECODE in self.chose and self.strategy.remembers:
            return False
        return self.dense and all(reads.chosen == reads.possible for reads in self.reads.values())

    def runs(self, phase: Phase, queries: int) -> Strategy:
        """What the next tokens run under: the strategy's part for the phase, or dense where choosing is not worth it.

        What follows a dense prompt in chunks is dense as well, however long it has grown: it was the first time.
        """
        if phase is Phase.PREFILL and self.dense:
            return self.prompt_strategy
        return self.strategy.at(phase, self.computed + queries, queries)

    def page_keys(self) -> list[bytes]:
        """Keys of the known full pages that others may share; the scheduler holds back some of a sparse prompt's.

        Pages of generated tokens are among them only while everything is exact: a prompt with the same tokens would
        otherwise get other content than its own prefill yields.
        """
        if self.keys is None:
            return []
        return self.keys.upto(self.tokens if self.exact else self.request.prompt)

    def start(self, now: float) -> None:
        """The first step begins."""
        if self.started is None:
            self.started = now
            self.cached = self.computed

    def append(self, token: int, now: float) -> None:
        self.tokens.append(token)
        self.first_token = self.first_token or now
        self.last_token = now

    def prompt_info(self) -> PromptInfo:
        return PromptInfo(
            self.request.request_id, self.prompt_len, self.cached, self.strategy.name, self.timings().queue_ms
        )

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
        """What was read and kept. Coverage is that of the phases in which the strategy chose.

        Within such a phase the steps and layers that ran dense count as 1: they are part of what its tokens kept. A
        phase that was dense throughout is left out, so that many generated tokens cannot hide what their prompt lost.
        """
        prefill, decode = self.reads[Phase.PREFILL], self.reads[Phase.DECODE]
        moved, at_tokens = self.traffic[Phase.PREFILL], self.traffic[Phase.DECODE]
        chose = sum((coverage for coverage in self.coverage.values() if coverage.chose), Coverage())
        return Sparsity(
            strategy=self.strategy.name,
            prefill_density=prefill.density,
            decode_density=decode.density,
            coverage=chose.mean,
            dense_fallback=bool(self.fell_back - self.chose),
            kv_bytes_read=prefill.bytes + decode.bytes,
            kv_bytes_moved=moved.fetched + at_tokens.fetched,
            coverage_min=chose.least,
            widened=chose.widened_share,
            estimated=chose.estimated_share,
            dropped_bound=chose.dropped_bound,
            kv_bytes_written=moved.written + at_tokens.written,
            decode_bytes_moved=at_tokens.fetched,
            kv_hits=at_tokens.hits,
            kv_misses=at_tokens.misses,
            kv_overlap=self.locality.mean_overlap,
            bound_exceeded=self.locality.bound_exceeded_share,
        )
