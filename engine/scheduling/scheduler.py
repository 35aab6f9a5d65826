"""Who runs next. Host integers only."""

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
    """One step's work: a chunk of one prompt, or one token of every sequence that decodes under one strategy."""

    phase: Phase
    strategy: Strategy
    sequences: tuple[Sequence, ...]
    spans: tuple[Span, ...]

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Sequences whose last known token is in this batch, so that it yields a new one."""
        pairs = zip(self.sequences, self.spans, strict=True)
        return tuple(sequence for sequence, span in pairs if span.stop == len(sequence.tokens))

    @property
    def title(self) -> str:
        """What it does, in words."""
        tokens, longest = sum(span.length for span in self.spans), max(span.stop for span in self.spans)
        return f"a {self.phase.value} step of {tokens} tokens, the longest context {longest}"

    def alone(self) -> list[Batch]:
        """The same work, one sequence at a time."""
        pairs = zip(self.sequences, self.spans, strict=True)
        return [Batch(self.phase, self.strategy, (sequence,), (span,)) for sequence, span in pairs]


class Scheduler:
    """Continuous batching over a paged cache.

    Prompt chunks and decode steps take turns, so neither starves the other; among unfinished prompts the oldest and the
    shortest take turns. When pages run out while decoding, the sequence that would run last gives its pages back and is
    computed again later.

    A prompt runs in chunks of the same tokens under the same strategy, however much of it was there already and
    however often it was preempted; unless it is dense, for then it does not matter how it is cut.
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
        self._serial += 1
        sequence.serial = sequence.serial or self._serial
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda waiting: waiting.order)

    def finish(self, sequence: Sequence) -> None:
        """Forget the sequence, wherever it is, and give its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def fail(self, sequence: Sequence, failure: Failure) -> None:
        """Forget a sequence that cannot go on; nobody shall begin with its pages if those may be spoilt."""
        if failure.lost and sequence.handle is not None:
            self._cache.withdraw(sequence.handle)
        self.finish(sequence)
        self._failed.append((sequence, failure))

    def take_failed(self) -> list[tuple[Sequence, Failure]]:
        """The sequences that have failed since the last call, and why."""
        failed, self._failed = self._failed, []
        return failed

    def next_batch(self) -> Batch | None:
        """The next step's work, its pages reserved; None when nobody can run now."""
        self._admit()
        prefill = [sequence for sequence in self.running if sequence.phase is Phase.PREFILL]
        decode = [sequence for sequence in self.running if sequence.phase is Phase.DECODE]
        if prefill and (not decode or self._last_phase is Phase.DECODE):
            return self._prefill_batch(prefill)
        return self._decode_batch(decode) if decode else None

    def commit(self, batch: Batch, tokens: SequenceOf[int]) -> None:
        """Take in a finished step: what it computed, and a new token for each of `batch.sampled`."""
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
                break  # it has to wait, so all behind it do

    def _attempt(self, work: Callable[[Sequence], bool], sequence: Sequence) -> bool:
        """What `work` says of the sequence; False too where it fails on it, and then the sequence is forgotten."""
        try:
            return work(sequence)
        except Exception as error:
            failure = failure_of(error, f"the pages of {len(sequence.tokens)} tokens")
            if failure is None:
                raise
        self.fail(sequence, failure)
        return False

    def _admit_one(self, sequence: Sequence) -> bool:
        """Open the sequence with the prefix that is cached and pages for all its known tokens and one more."""
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
        """Pages of a prefix that may be reused: the last token must run to yield its successor."""
        known = len(sequence.tokens)
        return min(self._shareable(sequence, known), known - 1) // self._cache.spec.page_size

    def _shareable(self, sequence: Sequence, tokens: int) -> int:
        """So many of the first `tokens` as hold what every prompt computes that begins with them.

        Where pages are chosen, what a token holds may follow from all of its chunk, and from whether the prompt ends
        near: whole chunks only, and none with rows that are treated as the prompt's end.
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
        """What runs next, noted down: whether the strategy got to choose or not."""
        chosen = sequence.runs(phase, queries)
        if chosen == sequence.strategy.part(phase):
            sequence.chose.add(phase)
        elif phase is Phase.DECODE or sequence.dense:  # a short chunk at the end of a long prompt is no fallback
            sequence.fell_back.add(phase)
        return chosen

    def _reserve_next(self, sequence: Sequence) -> bool:
        """A page for the sequence's next token, taken from whoever would run last if need be."""
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
        """Offer the pages that have become full to the prefix cache, as far as others may share them."""
        full = self._shareable(sequence, sequence.computed) // self._cache.spec.page_size
        if full > sequence.kept:
            self._cache.keep(_handle(sequence), sequence.page_keys()[sequence.kept : full], sequence.kept)
            sequence.kept = full


def _handle(sequence: Sequence) -> int:
    assert sequence.handle is not None, "a sequence that runs holds pages"
    return sequence.handle
