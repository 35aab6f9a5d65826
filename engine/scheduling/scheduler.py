"""Continuous batching: the choice of each step's batch. Host integers only."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from keysift.attention import Strategy
from keysift.kvcache import OutOfFrames, PagedCache, Phase, Span

from .failures import Failure, failure_of
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Work of one step: a chunk of one prompt, or one token of every sequence that decodes under one strategy."""

    phase: Phase
    strategy: Strategy
    sequences: tuple[Sequence, ...]
    spans: tuple[Span, ...]

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Sequences whose last known token is in this batch, so that the step yields a new one."""
        pairs = zip(self.sequences, self.spans, strict=True)
        return tuple(sequence for sequence, span in pairs if span.stop == len(sequence.tokens))

    @property
    def title(self) -> str:
        """Description for error messages."""
        tokens, longest = sum(span.length for span in self.spans), max(span.stop for span in self.spans)
        return f"a {self.phase.value} step of {tokens} tokens, the longest context {longest}"

    def alone(self) -> list[Batch]:
        """The same work as batches of one sequence each."""
        pairs = zip(self.sequences, self.spans, strict=True)
        return [Batch(self.phase, self.strategy, (sequence,), (span,)) for sequence, span in pairs]


class Scheduler:
    """Continuous batching over a paged cache.

    Prompt chunks and decode steps alternate, so neither starves the other; among unfinished prompts the oldest and the
    shortest alternate. When pages run out while decoding, the sequence of lowest priority is preempted: it frees its
    pages and is computed again later.

    A sparse prompt is always cut into the same chunks under the same strategy, however much of it was cached and
    however often it was preempted. For a dense prompt the cut does not matter.
    """

    def __init__(self, cache: PagedCache, *, max_running: int, chunk: int, queries_per_row: int) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._failed: list[tuple[Sequence, Failure]] = []
        self._cache = cache
        self._max_running = max_running
        self._chunk = chunk
        self._align = queries_per_row
        self._last_phase = Phase.DECODE
        self._oldest_turn = True
        self._serial = 0
        self._last_strategy: Strategy | None = None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, new or preempted."""
        self._serial += 1
        sequence.serial = sequence.serial or self._serial
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda waiting: waiting.order)

    def finish(self, sequence: Sequence) -> None:
        """Remove the sequence, running or waiting, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def fail(self, sequence: Sequence, failure: Failure) -> None:
        """Remove a sequence that cannot continue; pages that may be corrupt leave the prefix cache."""
        if failure.lost and sequence.handle is not None:
            self._cache.withdraw(sequence.handle)
        self.finish(sequence)
        self._failed.append((sequence, failure))

    def take_failed(self) -> list[tuple[Sequence, Failure]]:
        """Sequences that failed since the last call, each with its failure."""
        failed, self._failed = self._failed, []
        return failed

    def next_batch(self) -> Batch | None:
        """Work of the next step, its pages reserved; None when nothing can run now."""
        self._admit()
        prefill = [sequence for sequence in self.running if sequence.phase is Phase.PREFILL]
        decode = [sequence for sequence in self.running if sequence.phase is Phase.DECODE]
        if prefill and (not decode or self._last_phase is Phase.DECODE):
            return self._prefill_batch(prefill)
        return self._decode_batch(decode) if decode else None

    def commit(self, batch: Batch, tokens: SequenceOf[int]) -> None:
        """Record a finished step: the tokens that it computed, and a new one for each of `batch.sampled`."""
        now = time.monotonic()
        sampled = batch.sampled
        for sequence, span in zip(batch.sequences, batch.spans, strict=True):
            sequence.computed = span.stop
            self._keep(sequence)
        for sequence, token in zip(sampled, tokens, strict=True):
            sequence.append(token, now)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            first = self.waiting[0]
            if self._attempt(self._admit_one, first):
                self.running.append(self.waiting.pop(0))
            elif first in self.waiting:
                break  # the first has to wait, so all after it do

    def _attempt(self, work: Callable[[Sequence], bool], sequence: Sequence) -> bool:
        """Result of `work` on the sequence; False after a failure, which removes the sequence."""
        try:
            return work(sequence)
        except Exception as error:
            failure = failure_of(error, f"the pages of {len(sequence.tokens)} tokens")
            if failure is None:
                raise
        self.fail(sequence, failure)
        return False

    def _admit_one(self, sequence: Sequence) -> bool:
        """Open the sequence with its cached prefix, and reserve pages for all its known tokens and one more."""
        spec, known = self._cache.spec, len(sequence.tokens)
        shared = self._cache.prefix.match(sequence.page_keys()[: self._reusable(sequence)])
        grain = (self._align if sequence.dense else self._chunk) // spec.page_size
        aligned = len(shared) // grain * grain
        handle = self._cache.open()
        try:
            self._cache.share(handle, shared[:aligned])
            self._cache.reserve(handle, known + 1)
        except Exception as error:
            self._cache.release(handle)
            if isinstance(error, OutOfFrames):
                return False
            raise
        sequence.handle, sequence.computed, sequence.kept = handle, aligned * spec.page_size, aligned
        return True

    def _reusable(self, sequence: Sequence) -> int:
        """Cached pages that the sequence may reuse: its last token must run to yield the next."""
        known = len(sequence.tokens)
        return min(self._shareable(sequence, known), known - 1) // self._cache.spec.page_size

    def _shareable(self, sequence: Sequence, tokens: int) -> int:
        """Tokens, of the first `tokens`, whose keys and values are those of every prompt that begins with them.

        Under a sparse strategy they depend on the whole chunk and on a near end of the prompt: only whole chunks count,
        without rows that are treated as the prompt's end.
        """
        if sequence.dense:
            return tokens
        inside = sequence.prompt_len - sequence.prompt_strategy.rows_at_the_end * self._align
        return max(min(tokens, inside), 0) // self._chunk * self._chunk

    def _prefill_batch(self, prefill: list[Sequence]) -> Batch:
        key = (lambda s: s.order) if self._oldest_turn else (lambda s: (s.remaining, s.order))
        self._oldest_turn = not self._oldest_turn
        sequence = min(prefill, key=key)
        length = min(self._chunk, sequence.in_chunks - sequence.computed)
        return self._batch(Phase.PREFILL, self._effective(sequence, Phase.PREFILL, length), [sequence], length)

    def _decode_batch(self, decode: list[Sequence]) -> Batch | None:
        ordered = sorted(decode, key=lambda s: s.order)
        ready = [sequence for sequence in ordered if self._attempt(self._reserve_next, sequence)]
        groups: dict[Strategy, list[Sequence]] = {}
        for sequence in ready:
            groups.setdefault(self._effective(sequence, Phase.DECODE), []).append(sequence)
        if not groups:
            return None
        self._last_strategy = strategy = self._next_strategy(list(groups))
        return self._batch(Phase.DECODE, strategy, groups[strategy], 1)

    def _next_strategy(self, strategies: list[Strategy]) -> Strategy:
        """Strategies that decode at the same time take turns, in order of first use."""
        turn = strategies.index(self._last_strategy) + 1 if self._last_strategy in strategies else 0
        return strategies[turn % len(strategies)]

    def _batch(self, phase: Phase, strategy: Strategy, sequences: list[Sequence], length: int) -> Batch:
        self._last_phase = phase
        for sequence in sequences:
            sequence.start(time.monotonic())
        spans = tuple(Span(_handle(sequence), sequence.computed, length) for sequence in sequences)
        return Batch(phase, strategy, tuple(sequences), spans)

    def _effective(self, sequence: Sequence, phase: Phase, queries: int = 1) -> Strategy:
        """Strategy of the next step: the sequence's own or dense. Records which of them in the sequence."""
        chosen = sequence.runs(phase, queries)
        if chosen == sequence.strategy.part(phase):
            sequence.chose.add(phase)
        elif phase is Phase.DECODE or sequence.dense:  # a short last chunk of a long prompt is no fallback
            sequence.fell_back.add(phase)
        return chosen

    def _reserve_next(self, sequence: Sequence) -> bool:
        """Reserve a page for the sequence's next token, preempting those of lowest priority, maybe itself."""
        while sequence.handle is not None:
            try:
                self._cache.reserve(sequence.handle, len(sequence.tokens))
                return True
            except OutOfFrames:
                self._preempt(max(self.running, key=lambda running: running.order))
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._cache.release(_handle(sequence))
        sequence.handle = None

    def _keep(self, sequence: Sequence) -> None:
        """Add pages that became full to the prefix cache, as far as other sequences may share them."""
        full = self._shareable(sequence, sequence.computed) // self._cache.spec.page_size
        if full > sequence.kept:
            self._cache.keep(_handle(sequence), sequence.page_keys()[sequence.kept : full], sequence.kept)
            sequence.kept = full


def _handle(sequence: Sequence) -> int:
    assert sequence.handle is not None, "a sequence that runs holds pages"
    return sequence.handle
