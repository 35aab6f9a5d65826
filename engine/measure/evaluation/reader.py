"""Step-by-step driver of an engine: prefill prompts, decode greedily or along given tokens, and read every logit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from keysift.attention import Coverage, Locality, Reads, Strategy
from keysift.kvcache import DeviceTier, Phase, Span
from keysift.kvcache.index import IndexSpec

from ...engine import Engine
from ...errors import ResourceExhausted
from ...request import Request, Sparsity
from ...scheduling.batch import Batch
from ...scheduling.sequence import Sequence
from ...support import Facts, check
from .witness import Ledger

AT_ONCE = 64
"""Known tokens of one sequence that are decoded in one step.

All keys of a layer are written before it is read, and no token sees a later key, so they are decoded as if one by one,
and take little longer than one.
"""
OnLogits = Callable[[int, Tensor], None]
"""Receives the position of a prompt's token, and logits [V] of the token after it."""


@dataclass(frozen=True, slots=True)
class Mark:
    """State of a reading to return to."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    next_logits: Tensor
    reads: dict[Phase, Reads]
    coverage: dict[Phase, Coverage]
    locality: Locality


@dataclass(slots=True, eq=False)
class Reading:
    """A prompt in the cache, its generated tokens, and the logits of the next one."""

    sequence: Sequence
    next_logits: Tensor = field(default_factory=lambda: torch.empty(0))
    """[V] fp32, logits of the token after the last one; empty before the prompt is read."""

    @property
    def handle(self) -> int:
        assert self.sequence.handle is not None, "it is open"
        return self.sequence.handle

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.sequence.tokens[self.sequence.prompt_len :]

    @property
    def sparsity(self) -> Sparsity:
        return self.sequence.sparsity()

    @property
    def decode_density(self) -> float | None:
        """Density of the decoded tokens; None before the second, as the first comes from the prompt's own step."""
        reads = self.sequence.reads[Phase.DECODE]
        return reads.density if reads.possible else None

    def mark(self) -> Mark:
        """The present state, for `Reader.rewind`."""
        sequence = self.sequence
        reads, coverage = dict(sequence.reads), dict(sequence.coverage)
        prompt, generated = sequence.request.prompt, tuple(self.generated)
        return Mark(prompt, generated, self.next_logits, reads, coverage, sequence.locality)


class Reader:
    """Drives an engine's model and cache step by step, with access to every logit.

    The steps are those that the engine runs for a request that is alone, so the tokens are the same. The engine must
    have no requests meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        check(engine.config, Facts(one_process=True))
        self.engine = engine
        self._cache = engine.cache
        self._ledger: Ledger | None = None
        self._number = itertools.count()
        self._at_once = AT_ONCE if isinstance(engine.cache.tier, DeviceTier) else 1

    def fits(self, lengths: SequenceOf[int]) -> bool:
        """True if sequences of these lengths can be open at the same time."""
        pages = sum(map(self._cache.spec.pages_for, lengths))
        return len(lengths) <= self.engine.config.max_num_seqs and pages <= self._cache.free_pages

    @contextmanager
    def watching(self, ledger: Ledger) -> Iterator[None]:
        """Record in `ledger` the attention that the steps inside the block really keep; they take longer."""
        self._ledger = ledger
        try:
            yield
        finally:
            self._ledger = None

    @contextmanager
    def open(
        self, prompts: SequenceOf[SequenceOf[int]], strategy: Strategy, room: int, *, also: Iterable[Strategy] = ()
    ) -> Iterator[list[Reading]]:
        """Unread prompts, with room for `room` further tokens of each, up to the model's length; releases their pages.

        Args:
            also: other strategies that will decode after the prompts: their indexes are filled too.

        Raises:
            ResourceExhausted: the prompts do not fit; see `fits`.
        """
        sizes = [min(len(prompt) + room, self.engine.model.max_model_len) for prompt in prompts]
        if not self.fits(sizes):
            raise ResourceExhausted(f"kv_memory: {sum(sizes)} tokens in {len(sizes)} sequences do not fit at once")
        indexes = {index for each in (strategy, *also) if (index := each.index_spec()) is not None}
        readings: list[Reading] = []
        try:
            for prompt, size in zip(prompts, sizes, strict=True):
                readings.append(self._open(prompt, strategy, size, indexes))
                self._cache.reserve(readings[-1].handle, size)
            yield readings
        finally:
            for reading in readings:
                self._cache.release(reading.handle)

    def _open(self, prompt: SequenceOf[int], strategy: Strategy, size: int, indexes: Iterable[IndexSpec]) -> Reading:
        request = Request(f"reading-{next(self._number)}", tuple(prompt), bypass_prefix_cache=True)
        sequence = Sequence(request, strategy, size - len(prompt))
        sequence.handle = self._cache.open(*indexes)
        return Reading(sequence)

    def read(
        self, reading: Reading, positions: SequenceOf[int] = (), on_logits: OnLogits = lambda position, logits: None
    ) -> None:
        """Prefill the rest of the prompt, chunk by chunk.

        Args:
            positions: ascending positions of the prompt.
            on_logits: receives the logits after the tokens at these positions.
        """
        sequence, chunk = reading.sequence, self.engine.config.prefill_chunk
        while sequence.computed < sequence.prompt_len:
            length = min(chunk, sequence.prompt_len - sequence.computed)
            span = Span(reading.handle, sequence.computed, length)
            here = [position for position in positions if span.start <= position < span.stop]
            wanted = [*here, span.stop - 1]
            batch = Batch(Phase.PREFILL, sequence.runs(Phase.PREFILL, length), (sequence,), (span,))
            logits = self._run(batch, torch.tensor(wanted) - span.start)
            for position, row in zip(here, logits, strict=False):
                on_logits(position, row)
            sequence.computed = span.stop
            reading.next_logits = logits[-1]

    def extend(self, reading: Reading, tokens: SequenceOf[int]) -> None:
        """Append tokens to a prompt that nothing follows yet; `read` then prefills them."""
        sequence = reading.sequence
        assert not reading.generated, "tokens were decoded after the prompt"
        sequence.request = replace(sequence.request, prompt=(*sequence.request.prompt, *tokens))
        sequence.max_new_tokens -= len(tokens)
        sequence.tokens.extend(tokens)

    def follow(self, reading: Reading, tokens: SequenceOf[int]) -> Tensor:
        """Decode given tokens [n]: [n, V] fp32, the logits that predicted each of them."""
        logits, sequence = [reading.next_logits[None]], reading.sequence
        sequence.tokens.extend(tokens)
        while sequence.remaining:
            strategy, count = self._next(sequence)
            spans = tuple(Span(reading.handle, sequence.computed + i, 1) for i in range(count))
            logits.append(self._run(Batch(Phase.DECODE, strategy, (sequence,) * count, spans), torch.arange(count)))
            sequence.computed += count
        everything = torch.cat(logits)
        reading.next_logits = everything[-1]
        return everything[:-1]

    def _next(self, sequence: Sequence) -> tuple[Strategy, int]:
        """Strategy of the next known token, and the number of tokens that one step may run under it."""
        strategy, most = sequence.runs(Phase.DECODE, 1), min(self._at_once, sequence.remaining)
        alike = (sequence.strategy.at(Phase.DECODE, sequence.computed + 1 + i, 1) == strategy for i in range(most))
        return strategy, sum(itertools.takewhile(bool, alike))

    def rewind(self, reading: Reading, mark: Mark) -> None:
        """Return to a mark, as if nothing had been read or decoded since; decode history is lost."""
        sequence, length = reading.sequence, len(mark.prompt) + len(mark.generated)
        size = sequence.prompt_len + sequence.max_new_tokens
        self._cache.rollback(reading.handle, length)
        self._cache.reserve(reading.handle, size)
        sequence.request = replace(sequence.request, prompt=mark.prompt)
        sequence.max_new_tokens = size - sequence.prompt_len
        sequence.tokens[:] = (*mark.prompt, *mark.generated)
        sequence.computed = length
        sequence.reads, sequence.coverage = dict(mark.reads), dict(mark.coverage)
        sequence.locality, reading.next_logits = mark.locality, mark.next_logits

    def generate(self, readings: SequenceOf[Reading], done: Callable[[Reading], bool]) -> None:
        """Decode every reading greedily until it is `done`, all of them in one batch."""
        while running := [reading for reading in readings if not self._take(reading, done)]:
            groups: dict[Strategy, list[Reading]] = {}
            for reading in running:
                groups.setdefault(reading.sequence.runs(Phase.DECODE, 1), []).append(reading)
            for strategy, group in groups.items():
                self._decode(strategy, group)

    def _take(self, reading: Reading, done: Callable[[Reading], bool]) -> bool:
        """Append the likeliest token unless the reading is done; returns True if it is done now."""
        if not done(reading):
            reading.sequence.tokens.append(int(reading.next_logits.argmax()))
        return done(reading)

    def _decode(self, strategy: Strategy, group: list[Reading]) -> None:
        sequences = tuple(reading.sequence for reading in group)
        spans = tuple(Span(reading.handle, reading.sequence.computed, 1) for reading in group)
        logits = self._run(Batch(Phase.DECODE, strategy, sequences, spans), torch.arange(len(group)))
        for reading, row in zip(group, logits, strict=True):
            reading.sequence.computed += 1
            reading.next_logits = row

    def _run(self, batch: Batch, last: Tensor) -> Tensor:
        """Logits [B, V] on the host after the tokens at indices last [B]; adds up the statistics of the step."""
        watched = batch if self._ledger is None else self._ledger.witness(batch)
        logits, telemetry = self.engine.runner.forward(watched, last.to(self._cache.device))
        reads = telemetry.reads()
        covered = telemetry.coverage(reads)
        if batch.phase is Phase.PREFILL:
            reads, covered = [sum(reads, Reads())], [sum(covered, Coverage())]
        for sequence, read, kept in zip(batch.sequences, reads, covered, strict=True):
            sequence.reads[batch.phase] += read
            sequence.coverage[batch.phase] += kept
        if batch.phase is Phase.DECODE:
            for sequence, locality in zip(batch.sequences, telemetry.locality(), strict=True):
                sequence.locality += locality
        if self._ledger is not None:
            self._ledger.add(batch, telemetry)
        return logits.cpu()
