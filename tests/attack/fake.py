"""A real engine over a made-up model: its keys and values are hashes of all that real ones depend on.

So a page that is reused wrongly, lost or overwritten changes the answer, in microseconds a step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

from keysift.attention import Coverage, Dense, Locality, Reads, Strategy, untraced
from keysift.engine import Engine, EngineConfig
from keysift.engine.execution.forward import StepResult
from keysift.engine.execution.sampler import Sampled, SamplerState
from keysift.engine.model.loaded import LoadedModel
from keysift.engine.model.tokenizer import Tokenizer
from keysift.engine.preparation import Preparation
from keysift.engine.request import Request
from keysift.engine.scheduling.batch import Batch
from keysift.engine.scheduling.scheduler import Scheduler
from keysift.engine.scheduling.sequence import Sequence as Live
from keysift.kvcache import CacheSpec, DeviceTier, PagedCache, Phase, Span, Traffic
from tests.models import llama, make_tokenizer

PAGE, ROW, CHUNK, MAX_LEN = 4, 8, 16, 96
READS_ALL = 24
"""Tokens of a context up to which a strategy for generated tokens reads everything, and so is exact."""
EOS, FIRST, TOKENS = 2, 3, 200
SPEC = CacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, page_size=PAGE)


@dataclass(frozen=True)
class Work:
    """All that the keys and values of a span depend on, but for its tokens and what precedes them."""

    owner: int
    """Requests of different owners have different contents, as sharing between them is a leak."""
    strategy: Strategy
    phase: Phase
    start: int
    stop: int
    rows_at_the_end: int
    """Rows of the span that are treated as the prompt's end."""
    reproducible: bool
    history: int | None = None
    """What a strategy that remembers knows of the token before."""

    @property
    def exact(self) -> bool:
        """Every token reads its whole context."""
        return isinstance(self.strategy, Dense) or (self.phase is Phase.DECODE and self.stop <= READS_ALL)

    @property
    def any_cut(self) -> bool:
        """The contents do not depend on the span that a token is computed in."""
        return self.exact and not self.reproducible and not self.strategy.remembers

    def contents(self, past: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """The contents of the span's tokens, one by one."""
        made = list(past)
        for token in tokens:
            made.append(hash((self.owner, token, *made)))
        if self.any_cut:
            return made[len(past) :]
        where = (self.start, self.stop, self.phase is Phase.DECODE, _number(self.strategy), self.rows_at_the_end)
        return [hash((each, made[-1], self.history, *where)) for each in made[len(past) :]]


@cache
def _number(strategy: Strategy) -> int:
    """Equal in every process, unlike the hash of a string."""
    return zlib.crc32(repr(strategy).encode())


def owner_of(request: Request) -> int:
    """Number of those who may share pages: of one salt, or of one request that bypasses the prefix cache."""
    return zlib.crc32((f"alone {request.request_id}" if request.bypass_prefix_cache else request.cache_salt).encode())


def token_of(content: int) -> int:
    """The token that follows a text whose last token has this content."""
    return FIRST + content % TOKENS if content % 24 else EOS


def work_of(live: Live, strategy: Strategy, phase: Phase, start: int, stop: int) -> Work:
    rows_left = -(-(live.prompt_len - stop) // ROW)
    rows = max(live.prompt_strategy.rows_at_the_end - rows_left, 0) if phase is Phase.PREFILL else 0
    return Work(owner_of(live.request), strategy, phase, start, stop, rows, live.reproducible)


def alone(live: Live) -> list[int]:
    """Tokens of a request by definition: its prompt in whole chunks, then token by token, with no cache at all."""
    strategy, prompt = live.strategy, live.request.prompt
    made: list[int] = []
    for start in range(0, len(prompt), CHUNK):
        stop = min(start + CHUNK, len(prompt))
        part = live.prompt_strategy if live.dense else strategy.at(Phase.PREFILL, stop, stop - start)
        made += work_of(live, part, Phase.PREFILL, start, stop).contents(made, prompt[start:stop])
    said, history = [token_of(made[-1])], None
    while said[-1] != EOS and len(said) < live.max_new_tokens:
        stop = len(made) + 1
        part = strategy.at(Phase.DECODE, stop, 1)
        work = work_of(live, part, Phase.DECODE, stop - 1, stop)
        made += remembering(work, history).contents(made, said[-1:])
        history = made[-1] if part.remembers else None
        said.append(token_of(made[-1]))
    return said


def remembering(work: Work, history: int | None) -> Work:
    return replace(work, history=history) if work.strategy.remembers else work


class Hashing:
    """Runner of forward passes: contents are read from the frames that the cache names, and written there."""

    spans = staticmethod(untraced)

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self._pages: list[list[int]] = [[0] * PAGE for _ in range(cache.allocator.total)]
        self._histories: dict[tuple[int, int], tuple[Live, int, int]] = {}  # as `Recent`, twice: a step may run again
        self._garbage = 0
        self.fault: Callable[[Batch], None] = lambda batch: None
        """Called after a step's contents are written, may raise."""

    def run(self, batch: Batch, states: Sequence[SamplerState]) -> StepResult:
        works = [self._forward(batch, live, span) for live, span in zip(batch.sequences, batch.spans, strict=True)]
        self.fault(batch)
        sampled = [
            Sampled(token_of(self._read(live, span.stop)[-1]), ())
            for live, span in zip(batch.sequences, batch.spans, strict=True)
            if live in batch.sampled
        ]
        reads = [Reads(1.0, 1.0 if work.exact else 2.0) for work in works]
        count = len(works)
        return StepResult(sampled, reads, [Coverage()] * count, Traffic(), [Locality()] * count)

    def rehearse(self) -> None:
        """There is no backend that could fail."""

    def spoil(self, live: Live, start: int = 0) -> None:
        """Overwrite the contents of the tokens from `start` on, as far as nobody else holds their pages."""
        assert live.handle is not None
        for page, frame in enumerate(self._cache._frames[live.handle]):
            if self._cache.allocator._references[frame] == 1:
                self._garbage += 1
                at = max(start - page * PAGE, 0)
                self._pages[frame][at:] = [-self._garbage] * max(PAGE - at, 0)

    def _forward(self, batch: Batch, live: Live, span: Span) -> Work:
        work = work_of(live, batch.strategy, batch.phase, span.start, span.stop)
        found = self._histories.get((span.sequence, span.start % 2))
        if found is not None and found[:2] == (live, span.start):
            work = remembering(work, found[2])
        made = work.contents(self._read(live, span.start), live.tokens[span.start : span.stop])
        self._write(live, span, made)
        if batch.phase is Phase.DECODE and batch.strategy.remembers:
            self._histories[span.sequence, span.stop % 2] = live, span.stop, made[-1]
        return work

    def _read(self, live: Live, stop: int) -> list[int]:
        assert live.handle is not None
        frames = self._cache._frames[live.handle][: -(-stop // PAGE)]
        return [content for frame in frames for content in self._pages[frame]][:stop]

    def _write(self, live: Live, span: Span, made: Sequence[int]) -> None:
        held = self._cache._frames[span.sequence]
        for position, content in enumerate(made, start=span.start):
            frame = held[position // PAGE]
            assert self._cache.allocator.exclusive(frame), "a page that others may read is written"
            self._pages[frame][position % PAGE] = content


@dataclass(frozen=True, slots=True, kw_only=True)
class Stumbling(Strategy):
    """Strategy that fails where it is asked for its part in a step, while it is armed."""

    armed: ClassVar[bool] = False

    def at(self, phase: Phase, context_len: int, queries: int) -> Strategy:
        if Stumbling.armed:
            raise ValueError("armed")
        return Strategy.at(self, phase, context_len, queries)


class Claiming(DeviceTier):
    """Tier whose claims may fail."""

    fault: Callable[[], None] = staticmethod(lambda: None)

    def claim(self, frames: Sequence[int]) -> None:
        self.fault()


@cache
def model() -> LoadedModel:
    module = nn.Module()
    module.config = llama()
    return LoadedModel(
        name="fake",
        module=module,
        tokenizer=Tokenizer(make_tokenizer()),
        max_model_len=MAX_LEN,
        num_layers=SPEC.num_layers,
        num_query_heads=1,
        num_kv_heads=SPEC.num_kv_heads,
        head_dim=SPEC.head_dim,
        vocab_size=259,
        dtype=torch.float32,
        device=torch.device("cpu"),
        eos_token_ids=frozenset({EOS}),
        scale=1.0,
        windows=(0,),
        devices=(torch.device("cpu"),),
        fingerprint="fake",
    )


@cache
def base_config() -> EngineConfig:
    sizes = {"page_size": PAGE, "queries_per_row": ROW, "prefill_chunk": CHUNK}
    return EngineConfig(model="fake", strategy="dense", **sizes)


class FakeEngine(Engine):
    """The engine with all of its parts but a model and a runner."""

    def __init__(self, frames: int, **fields: Any) -> None:
        self._num_frames = frames
        super().__init__(base_config().model_copy(update=fields))

    def _load(self, report: Callable[[str], None]) -> None:
        config = self.config
        self.model = model()
        self.tokenizer = self.model.tokenizer
        self.tier = Claiming(SPEC, self._num_frames + 1, torch.device("cpu"))
        most = config.max_num_seqs
        self.cache = PagedCache(SPEC, self._num_frames, max_sequences=most, max_len=MAX_LEN, tier=self.tier)
        self.preparation = Preparation(config, self.model, self.cache, {})
        self.scheduler = Scheduler(
            self.cache, max_running=most, chunk=CHUNK, queries_per_row=ROW, patience=config.patience
        )
        self.runner = self.hashing = Hashing(self.cache)  # type: ignore[assignment]
