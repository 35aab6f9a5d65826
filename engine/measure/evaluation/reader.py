"""Reads prompts under any strategy and lets them go on: as the model wants to, or as it is told to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keysift.attention import Coverage, Reads, Strategy
from keysift.kvcache import DeviceTier, Phase, Span

from ...config import EngineConfig
from ...engine import Engine
from ...errors import InvalidRequest, ResourceExhausted
from ...request import Request, Sparsity
from ...scheduling.scheduler import Batch
from ...scheduling.sequence import Sequence
from .witness import Ledger

AT_ONCE = 64
"""Known tokens of one sequence that are decoded in one step.

All keys of a layer are written before it is read, and no token sees a key behind it, so they are decoded as if one by
one, and take little longer than one.
"""
Hear = Callable[[int, Tensor], None]
"""Is told the position of a prompt's token, and logits [V] of what follows it."""


@dataclass(slots=True, eq=False)
class Reading:
    """A prompt in the cache, and what is known of how it goes on."""

    sequence: Sequence
    ahead: Tensor = field(default_factory=lambda: torch.empty(0))
    """[V] fp32, logits of the token that follows the last one."""

    @property
    def handle(self) -> int:
        assert self.sequence.handle is not None, "it is open"
        return self.sequence.handle

    @property
    def said(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.sequence.tokens[self.sequence.prompt_len :]

    @property
    def sparsity(self) -> Sparsity:
        return self.sequence.sparsity()

    @property
    def decode_density(self) -> float | None:
        """None where nothing was decoded: the first token behind a prompt comes from the prompt."""
        reads = self.sequence.reads[Phase.DECODE]
        return reads.density if reads.possible else None


def check_ranks(config: EngineConfig) -> None:
    """Raises `InvalidRequest` for an engine that no `Reader` can drive, which need not be loaded to know it."""
    if (ranks := config.tensor_parallel_size) > 1:
        raise InvalidRequest("tensor_parallel_size", f"1 where all heads are looked at by one process, got {ranks}")


class Reader:
    """Drives an engine's model and cache step by step, where an `Engine` would serve: it hears every logit.

    The steps are those that the engine runs for a request that is alone, so what is said is the same. The engine must
    have no requests meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        check_ranks(engine.config)
        self.engine = engine
        self._cache = engine.cache
        self._ledger: Ledger | None = None
        self._number = itertools.count()
        self._at_once = AT_ONCE if isinstance(engine.cache.tier, DeviceTier) else 1

    def fits(self, lengths: SequenceOf[int]) -> bool:
        """Whether sequences of so many tokens can be open at the same time."""
        pages = sum(map(self._cache.spec.pages_for, lengths))
        return len(lengths) <= self.engine.config.max_num_seqs and pages <= self._cache.free_pages

    @contextmanager
    def watching(self, ledger: Ledger) -> Iterator[None]:
        """Have it measured what the steps inside the block really keep; they take longer."""
        self._ledger = ledger
        try:
            yield
        finally:
            self._ledger = None

    @contextmanager
    def open(
        self, prompts: SequenceOf[SequenceOf[int]], strategy: Strategy, room: int, *, also: Iterable[Strategy] = ()
    ) -> Iterator[list[Reading]]:
        """Unread prompts, with room for so many further tokens of each, as far as the model goes.

        Their pages come back in any case.
        `also` are other strategies that will decode behind them: their indexes see the prompts too. Raises
        `ResourceExhausted` where they do not fit; see `fits`.
        """
        sizes = [min(len(prompt) + room, self.engine.model.max_model_len) for prompt in prompts]
        if not self.fits(sizes):
            raise ResourceExhausted(f"kv_memory: {sum(sizes)} tokens in {len(sizes)} sequences do not fit at once")
        indexes = {index for each in (strategy, *also) if (index := each.index_spec()) is not None}
        for index in indexes:
            self._cache.index(index)
        readings: list[Reading] = []
        try:
            for prompt, size in zip(prompts, sizes, strict=True):
                readings.append(self._open(prompt, strategy, size))
                self._cache.reserve(readings[-1].handle, size)
            yield readings
        finally:
            for reading in readings:
                self._cache.release(reading.handle)
            for index in indexes - {self.engine.default.index_spec()}:
                self._cache.retire(index)

    def _open(self, prompt: SequenceOf[int], strategy: Strategy, size: int) -> Reading:
        request = Request(f"reading-{next(self._number)}", tuple(prompt), bypass_prefix_cache=True)
        sequence = Sequence(request, strategy, size - len(prompt))
        sequence.handle = self._cache.open()
        return Reading(sequence)

    def read(
        self, reading: Reading, positions: SequenceOf[int] = (), hear: Hear = lambda position, logits: None
    ) -> None:
        """Prefill the whole prompt, chunk by chunk; `hear` gets the logits after its tokens at these positions.

        They ascend.
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
                hear(position, row)
            sequence.computed = span.stop
            reading.ahead = logits[-1]

    def follow(self, reading: Reading, tokens: SequenceOf[int]) -> Tensor:
        """Decode tokens [n] whatever the model wants: [n, V] fp32, the logits that predicted each of them."""
        logits, sequence = [reading.ahead[None]], reading.sequence
        sequence.tokens.extend(tokens)
        while sequence.remaining:
            strategy, count = self._next(sequence)
            spans = tuple(Span(reading.handle, sequence.computed + i, 1) for i in range(count))
            logits.append(self._run(Batch(Phase.DECODE, strategy, (sequence,) * count, spans), torch.arange(count)))
            sequence.computed += count
        everything = torch.cat(logits)
        reading.ahead = everything[-1]
        return everything[:-1]

    def _next(self, sequence: Sequence) -> tuple[Strategy, int]:
        """What the next known token runs under, and how many of them run under the same."""
        strategy, most = sequence.runs(Phase.DECODE, 1), min(self._at_once, sequence.remaining)
        alike = (sequence.strategy.at(Phase.DECODE, sequence.computed + 1 + i, 1) == strategy for i in range(most))
        return strategy, sum(itertools.takewhile(bool, alike))

    def forget(self, reading: Reading, ahead: Tensor) -> None:
        """Back to the end of the prompt, behind which `ahead` [V] were the logits, as if nothing had been decoded."""
        sequence = reading.sequence
        self._cache.rollback(reading.handle, sequence.prompt_len)
        self._cache.reserve(reading.handle, sequence.prompt_len + sequence.max_new_tokens)
        del sequence.tokens[sequence.prompt_len :]
        sequence.computed = sequence.prompt_len
        sequence.reads[Phase.DECODE], sequence.coverage[Phase.DECODE] = Reads(), Coverage()
        reading.ahead = ahead

    def go_on(self, readings: SequenceOf[Reading], done: Callable[[Reading], bool]) -> None:
        """Take the likeliest token of every reading until it is `done`, all of them side by side."""
        while running := [reading for reading in readings if not self._take(reading, done)]:
            groups: dict[Strategy, list[Reading]] = {}
            for reading in running:
                groups.setdefault(reading.sequence.runs(Phase.DECODE, 1), []).append(reading)
            for strategy, group in groups.items():
                self._decode(strategy, group)

    def _take(self, reading: Reading, done: Callable[[Reading], bool]) -> bool:
        """Say the likeliest token, unless the reading ended before; whether it has ended now."""
        if not done(reading):
            reading.sequence.tokens.append(int(reading.ahead.argmax()))
        return done(reading)

    def _decode(self, strategy: Strategy, group: list[Reading]) -> None:
        sequences = tuple(reading.sequence for reading in group)
        spans = tuple(Span(reading.handle, reading.sequence.computed, 1) for reading in group)
        logits = self._run(Batch(Phase.DECODE, strategy, sequences, spans), torch.arange(len(group)))
        for reading, row in zip(group, logits, strict=True):
            reading.sequence.computed += 1
            reading.ahead = row

    def _run(self, batch: Batch, last: Tensor) -> Tensor:
        """Logits [B, V] on the host after the tokens at indices last [B]; books what was read."""
        watched = batch if self._ledger is None else self._ledger.witness(batch)
        logits, telemetry = self.engine.runner.forward(watched, last.to(self._cache.device))
        reads = telemetry.reads()
        covered = telemetry.coverage(reads)
        if batch.phase is Phase.PREFILL:
            reads, covered = [sum(reads, Reads())], [sum(covered, Coverage())]
        for sequence, read, kept in zip(batch.sequences, reads, covered, strict=True):
            sequence.reads[batch.phase] += read
            sequence.coverage[batch.phase] += kept
        if self._ledger is not None:
            self._ledger.hear(batch, telemetry)
        return logits.cpu()
