"""Continuous batching: the choice of each step's batch. Host integers only."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import TypeVar, cast

from keysift.attention import Coverage, Reads, Strategy
from keysift.kvcache import OutOfFrames, PagedCache, Phase, Span

from .batch import Batch
from .failures import Failure, failure_of
from .sequence import Blocked, Made, Sequence

T = TypeVar("T")


class Scheduler:
    """Continuous batching over a paged cache.

    Prompt chunks and decode steps alternate, so neither starves the other; among unfinished prompts the oldest and the
    shortest alternate. When pages run out while decoding, the last sequence in order is preempted: it frees its pages
    and is computed again later.

    The order is by priority, then by arrival. A request that cannot be admitted for lack of pages lets those pass that
    fit. A request that has waited for `patience` steps is old: the old go before all others, in order of arrival
    whatever their priority, and no request passes an old one. So no request waits for ever: once it is old, it waits
    for no more than those that run, and those that came before it.

    A sparse prompt is always cut into the same chunks under the same strategy, however much of it was cached and
    however often it was preempted. For a dense prompt the cut does not matter.
    """

    def __init__(
        self,
        cache: PagedCache,
        *,
        max_running: int,
        chunk: int,
        queries_per_row: int,
        patience: int = 256,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._failed: list[tuple[Sequence, Failure]] = []
        self._cache = cache
        self._max_running = max_running
        self._chunk = chunk
        self._align = queries_per_row
        self._patience = patience
        self._steps = 0
        self._last_phase = Phase.DECODE
        self._oldest_turn = True
        self._serial = 0
        self._turns: dict[Strategy, int] = {}
        """Step of the last turn of each strategy that decodes."""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, new or preempted."""
        if not sequence.serial:
            self._serial += 1
            sequence.serial = self._serial
        sequence.since, sequence.blocked = self._steps, None
        self.waiting.append(sequence)

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
        self._steps += 1
        self._admit()
        turns = [self._prefill_batch, self._decode_batch]
        for turn in turns if self._last_phase is Phase.DECODE else reversed(turns):
            if (batch := turn()) is not None:
                return batch
        return None

    def commit(self, sequence: Sequence, span: Span, token: int | None, now: float) -> None:
        """Record a finished step of one sequence, and the token that it sampled, if any."""
        sequence.computed = span.stop
        self._keep(sequence)
        if token is not None:
            sequence.append(token, now)
        elif sequence.phase is Phase.PREFILL:
            sequence.since = self._steps + 1  # every other step may be one of decoding

    def _running(self, phase: Phase) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.phase is phase]

    def _order(self, sequence: Sequence) -> tuple[int, int, float, int]:
        """Sort key of all choices: smaller goes first."""
        if self._is_old(sequence):
            return 0, 0, sequence.request.arrival, sequence.serial
        return 1, *sequence.order

    def _is_old(self, sequence: Sequence) -> bool:
        return self._waited(sequence) > self._patience

    def _waited(self, sequence: Sequence) -> int:
        """Steps that the sequence has waited."""
        return sequence.waited + (0 if sequence.since is None else max(self._steps - sequence.since, 0))

    def _admit(self) -> None:
        """Admit waiting sequences in order, past those that have to wait for pages and are not old."""
        for sequence in sorted(self.waiting, key=self._order):
            if len(self.running) >= self._max_running:
                return
            if self._attempt(self._admit_one, sequence):
                self.waiting.remove(sequence)
                self.running.append(sequence)
            elif self._is_old(sequence) and sequence in self.waiting:
                return

    def _attempt(self, work: Callable[[Sequence], T], sequence: Sequence) -> T | None:
        """Result of `work` on the sequence; None after a failure, which removes the sequence."""
        try:
            return work(sequence)
        except Exception as error:
            failure = failure_of(error, f"the scheduling of {len(sequence.tokens)} tokens")
        self.fail(sequence, failure)
        return None

    def _admit_one(self, sequence: Sequence) -> bool:
        """Open the sequence with its cached prefix, and reserve pages for all its known tokens and one more."""
        if self._is_blocked(sequence):
            return False
        spec, known = self._cache.spec, len(sequence.tokens)
        keys = sequence.page_keys()[: self._reusable(sequence)]
        shared = self._cache.match(keys, *sequence.index_specs)
        grain = (self._align if sequence.any_cut else self._chunk) // spec.page_size
        aligned = len(shared) // grain * grain
        handle = self._cache.open(*sequence.index_specs)
        try:
            self._cache.share(handle, shared[:aligned])
            self._cache.reserve(handle, known + 1)
            if sequence.started is None:
                sequence.reused = self._made(shared[:aligned])
        except Exception as error:
            self._cache.release(handle)
            if isinstance(error, OutOfFrames):
                missing = keys[len(shared)] if len(shared) < len(keys) else None
                sequence.blocked = Blocked(self._cache.free_pages, missing)
                return False
            raise
        sequence.handle, sequence.computed, sequence.kept = handle, aligned * spec.page_size, aligned
        return True

    def _is_blocked(self, sequence: Sequence) -> bool:
        """True where another try would find too few pages again, after a look at the whole prefix."""
        if (blocked := sequence.blocked) is None or self._cache.free_pages > blocked.free:
            return False
        return blocked.missing is None or blocked.missing not in self._cache.prefix

    def _made(self, shared: SequenceOf[int]) -> Made:
        """Statistics of the steps that computed cached pages."""
        return cast(Made, self._cache.prefix.note(shared[-1])) if shared else Made(Reads(), Coverage())

    def _reusable(self, sequence: Sequence) -> int:
        """Cached pages that the sequence may reuse: its last token must run to yield the next."""
        known = len(sequence.tokens)
        return min(self._shareable(sequence, known), known - 1) // self._cache.spec.page_size

    def _shareable(self, sequence: Sequence, tokens: int) -> int:
        """Tokens, of the first `tokens`, whose keys and values are those of every prompt that begins with them.

        Under a sparse strategy they depend on the whole chunk and on a near end of the prompt: only whole chunks count,
        without rows that are treated as the prompt's end.
        """
        if sequence.any_cut:
            return tokens
        inside = sequence.prompt_len - sequence.rows_at_the_end * self._align
        return max(min(tokens, inside), 0) // self._chunk * self._chunk

    def _prefill_batch(self) -> Batch | None:
        """A chunk of one prompt; None if no prompt can continue."""
        prefill = self._running(Phase.PREFILL)
        if not prefill:
            return None
        key = self._order if self._oldest_turn else (lambda s: (s.remaining, self._order(s)))
        self._oldest_turn = not self._oldest_turn
        for sequence in sorted(prefill, key=key):
            length = min(self._chunk, sequence.in_chunks - sequence.computed)
            choose = partial(self._effective, phase=Phase.PREFILL, queries=length)
            if (strategy := self._attempt(choose, sequence)) is not None:
                return self._batch(Phase.PREFILL, strategy, [sequence], length)
        return None

    def _decode_batch(self) -> Batch | None:
        """A token of each sequence of one strategy; None if none can continue."""
        groups: dict[Strategy, list[Sequence]] = {}
        decode = sorted(self._running(Phase.DECODE), key=self._order)
        ready = [sequence for sequence in decode if self._attempt(self._reserve_next, sequence)]
        for sequence in ready:
            strategy = self._attempt(partial(self._effective, phase=Phase.DECODE, queries=1), sequence)
            if strategy is not None and sequence.handle is not None:
                groups.setdefault(strategy, []).append(sequence)
        if not groups:
            return None
        strategy = self._next_strategy(list(groups))
        return self._batch(Phase.DECODE, strategy, groups[strategy], 1)

    def _next_strategy(self, strategies: list[Strategy]) -> Strategy:
        """Strategies that decode at the same time take turns: the one that waits longest, of equals the first."""
        self._turns = {strategy: self._turns.get(strategy, 0) for strategy in strategies}
        chosen = min(strategies, key=self._turns.__getitem__)
        self._turns[chosen] = self._steps
        return chosen

    def _batch(self, phase: Phase, strategy: Strategy, sequences: list[Sequence], length: int) -> Batch:
        self._last_phase = phase
        for sequence in sequences:
            sequence.start(time.monotonic())
            sequence.waited, sequence.since = self._waited(sequence), None
        spans = tuple(Span(_handle(sequence), sequence.computed, length) for sequence in sequences)
        return Batch(phase, strategy, tuple(sequences), spans)

    def _effective(self, sequence: Sequence, phase: Phase, queries: int) -> Strategy:
        """Strategy of the next step: the sequence's own or dense. Records which of them in the sequence."""
        chosen = sequence.runs(phase, queries)
        if chosen == sequence.strategy.part(phase):
            sequence.chose.add(phase)
        elif phase is Phase.DECODE or sequence.dense:  # a short last chunk of a long prompt is no fallback
            sequence.fell_back.add(phase)
        return chosen

    def _reserve_next(self, sequence: Sequence) -> bool:
        """Reserve a page for the sequence's next token, preempting the last in order, maybe itself."""
        while sequence.handle is not None:
            try:
                self._cache.reserve(sequence.handle, len(sequence.tokens))
                return True
            except OutOfFrames:
                self._preempt(max(self.running, key=self._order))
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
            keys = sequence.page_keys()[sequence.kept : full]
            self._cache.keep(_handle(sequence), keys, sequence.kept, sequence.made())
            sequence.kept = full


def _handle(sequence: Sequence) -> int:
    assert sequence.handle is not None, "a sequence that runs holds pages"
    return sequence.handle
