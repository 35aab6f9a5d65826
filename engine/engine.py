"""Engine: continuous batching of requests over one model, one forward pass at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from keysift.attention import Spans, Strategy, StrategyError, parse
from keysift.kvcache import PageKeys, Phase

from . import metrics
from .calibration import calibration
from .config import EngineConfig
from .errors import DuplicateRequest, InvalidRequest, ResourceExhausted, Unsupported
from .execution.forward import StepResult
from .execution.sampler import SamplerState, check, derive_seed
from .execution.watch import watched_tier
from .job import Job
from .memory.budget import make_cache
from .model.load import load
from .model.model_options import with_model_options
from .model.tokenizer import Detokenizer
from .parallel.group import assemble
from .request import EngineStatus, Finish, FinishReason, Output, Request
from .scheduling.failures import Failure, failure_of
from .scheduling.scheduler import Batch, Scheduler
from .scheduling.sequence import Sequence
from .text.transcript import Transcript


class Engine:
    """Runs many requests over one model and one paged cache.

    Not thread-safe: one thread owns it. Call `add` and `abort` between steps, `step` until `has_work` is false.
    """

    def __init__(self, config: EngineConfig, report: Callable[[str], None] = lambda message: None) -> None:
        """Load the model and allocate the cache; `report` receives a line for each slow part.

        Raises:
            InvalidRequest, ModelNotFound, Unsupported: the configuration cannot run here.
        """
        self.config = config
        _strategy(config.strategy, config.strategy_args)  # refuse a wrong name before loading
        self.group = assemble(config, report)
        with self.group.failure_scope():
            self._load(report)
        self._jobs: dict[str, Job] = {}
        self._outbox: list[Output] = []

    def _load(self, report: Callable[[str], None]) -> None:
        config = self.config
        self.model = load(config, report)
        self._crossovers = calibration.crossovers(config, self.model)
        self.tokenizer = self.model.tokenizer
        self.cache = make_cache(config, self.model, report, self.group.cache_type)
        self.default = self.strategy(config.strategy, config.strategy_args)
        calibration.announce(config, self._crossovers, report)
        self.scheduler = Scheduler(
            self.cache,
            max_running=config.max_num_seqs,
            chunk=config.prefill_chunk,
            queries_per_row=config.queries_per_row,
        )
        self.runner = self.group.runner(config, self.model, self.cache)
        self.runner.rehearse()

    @property
    def has_work(self) -> bool:
        """Requests are running or waiting, or outputs have not been returned yet."""
        return bool(self._jobs or self._outbox)

    @property
    def status(self) -> EngineStatus:
        """Requests and pages between two steps."""
        spec, cache = self.cache.spec, self.cache
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        return EngineStatus(running, waiting, cache.free_pages, cache.allocator.total, spec.page_size, spec.page_bytes)

    def strategy(self, name: str, arguments: tuple[str, ...] = ()) -> Strategy:
        """Strategy of a name, checked against the model and the cache.

        Options that `arguments` do not state come from the model's configuration, `dense_below` from the calibration of
        this machine. Raises `InvalidRequest` or `Unsupported` naming what is wrong.
        """
        try:
            stated = with_model_options(name, arguments, self.model)
        except StrategyError as error:
            raise InvalidRequest(error.field, error.problem) from None
        strategy = _strategy(name, calibration.calibrated(name, stated, self._crossovers))
        self._check_strategy(strategy)
        return strategy

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: a field is out of bounds.
            DuplicateRequest: a live request has this id.
            ResourceExhausted: the queue is full, or the request can never fit into the cache.
            Unsupported: its strategy does not fit the model or the cache.
        """
        if request.request_id in self._jobs:
            raise DuplicateRequest(f"request_id: {request.request_id!r} is that of a live request")
        sequence = self._sequence(request)
        self._check_size(sequence)
        if len(self._jobs) >= (room := self.config.max_num_seqs + self.config.max_queue):
            raise ResourceExhausted(
                f"max_queue: {len(self._jobs)} requests are running or waiting, at most {room}", retry_after_s=1.0
            )
        self._jobs[request.request_id] = self._job(sequence)
        if (spec := sequence.strategy.index_spec()) is not None:
            self.cache.index(spec)  # before the first chunk, whose keys it must contain
        self.scheduler.add(sequence)

    def check(self, request: Request) -> None:
        """Raise what `add` raises for the request itself, regardless of other requests."""
        self._check_size(self._sequence(request))

    def abort(self, request_id: str) -> bool:
        """End a request now and free its pages; its `Finish` comes with the next step's outputs. False: unknown id."""
        if (job := self._jobs.get(request_id)) is None:
            return False
        self._outbox.append(self._finish(job, FinishReason.CANCELLED))
        return True

    def step(self) -> list[Output]:
        """Run one forward pass, if there is work, and return its outputs.

        A request that runs out of memory, or whose pages the backing store fails to write or read, ends with
        `FinishReason.ERROR`; the others continue.
        """
        outputs, self._outbox = self._outbox, []
        if (batch := self.scheduler.next_batch()) is not None:
            with self.runner.spans(batch.phase.value):
                outputs += self._run(batch)
        for sequence, failure in self.scheduler.take_failed():
            outputs.append(self._finish(self._job_of(sequence), FinishReason.ERROR, failure))
        metrics.observe_status(self.status)
        return outputs

    def close(self) -> None:
        """End the other ranks, if there are any. The engine cannot run after that."""
        self.group.close()

    @contextmanager
    def watched(self, spans: Spans) -> Iterator[None]:
        """Trace the parts of every step with `spans` inside the block."""
        runner, cache, tier = self.runner, self.cache, self.cache.tier
        before, runner.spans, cache.tier = runner.spans, spans, watched_tier(tier, spans)
        try:
            yield
        finally:
            runner.spans, cache.tier = before, tier

    def _run(self, batch: Batch) -> list[Output]:
        """Run the batch; after a failure run each sequence alone, so that only those end that fail alone."""
        try:
            result = self.runner.run(batch, [self._job_of(sequence).sampler for sequence in batch.sampled])
        except Exception as error:
            failure = failure_of(error, batch.title)
            if failure is None:
                raise
        else:
            return self._commit(batch, result)
        if len(batch.sequences) > 1:  # outside the handler, which keeps the failed step's tensors alive
            return [output for part in batch.alone() for output in self._run(part)]
        self.scheduler.fail(batch.sequences[0], failure)
        return []

    def _sequence(self, request: Request) -> Sequence:
        """The scheduler's form of a request. Raises `InvalidRequest` or `Unsupported`."""
        limit, length = self.model.max_model_len, len(request.prompt)
        if not 0 < length < limit:
            raise InvalidRequest("prompt", f"1 to {limit - 1} tokens (max_model_len is {limit}), got {length}")
        wrong = min(request.prompt) if min(request.prompt) < 0 else max(request.prompt)
        if not 0 <= wrong < self.model.vocab_size:
            raise InvalidRequest("prompt", f"token ids from 0 to {self.model.vocab_size - 1}, got {wrong}")
        check(request.params, self.model.vocab_size, self.model.eos_token_ids)
        strategy = self.default
        if request.strategy is not None or request.strategy_args:
            strategy = self.strategy(request.strategy or self.config.strategy, request.strategy_args)
        sequence = Sequence(request, strategy, min(request.params.max_new_tokens, limit - length))
        sequence.keys = self._page_keys(sequence)
        return sequence

    def _check_strategy(self, strategy: Strategy) -> None:
        """Raises `Unsupported` where the cache does not suit the strategy, or cannot hold its index."""
        spec = strategy.index_spec()
        try:
            strategy.check(self.cache.spec)
            if spec is not None:
                self.cache.new_index(spec)
        except ValueError as error:
            raise Unsupported(f"strategy {strategy.name}: {error}") from None

    def _retire_index(self, sequence: Sequence) -> None:
        """Drop the index that only this sequence searched, since each request may bring another one."""
        spec = sequence.strategy.index_spec()
        in_use = {self.default.index_spec(), *(job.sequence.strategy.index_spec() for job in self._jobs.values())}
        if spec is not None and spec not in in_use:
            self.cache.retire(spec)

    def _page_keys(self, sequence: Sequence) -> PageKeys | None:
        """Prefix-cache keys of the sequence's pages; None where it does not use that cache.

        A page's content depends on the model, on the prompt's strategy with all its options, and on the tokens before.
        """
        request = sequence.request
        if not self.config.prefix_cache or request.bypass_prefix_cache:
            return None
        root = f"{self.model.fingerprint}|{sequence.prompt_strategy!r}|{request.cache_salt}"
        return PageKeys(root, self.config.page_size)

    def _check_size(self, sequence: Sequence) -> None:
        tokens, cache = sequence.prompt_len + sequence.max_new_tokens, self.cache
        spec, total, elsewhere = cache.spec, cache.allocator.total, self.config.kv_offload is not None
        field, page = ("kv_offload_memory", spec.kv_bytes) if elsewhere else ("kv_memory", spec.page_bytes)
        if (needed := spec.pages_for(tokens)) > total:
            raise ResourceExhausted(
                f"{field}: {tokens} tokens (prompt + max_new_tokens) need {needed} pages = {needed * page} bytes, "
                f"the cache has {total} pages = {total * page} bytes"
                + ("" if elsewhere else "; with kv_offload they need not all be in memory")
            )
        self._check_scans(sequence, Phase.PREFILL, sequence.prompt_len)
        self._check_scans(sequence, Phase.DECODE, tokens)

    def _check_scans(self, sequence: Sequence, phase: Phase, tokens: int) -> None:
        """Raises `ResourceExhausted` where the strategy reads all keys of a layer and the pool cannot hold them."""
        strategy, cache = sequence.runs(phase, tokens), self.cache
        pages, page = cache.spec.pages_for(tokens), cache.spec.num_kv_heads * cache.spec.read_bytes
        if strategy.scans and not cache.tier.holds(pages):
            raise ResourceExhausted(
                f"kv_memory: strategy {strategy.name} looks at all keys of a layer at once, which takes {pages * page} "
                f"bytes for {tokens} tokens, more than the pool spares for one layer (half of it at most)"
            )

    def _job(self, sequence: Sequence) -> Job:
        request, eos = sequence.request, self.model.eos_token_ids
        sampler = SamplerState(
            params=request.params,
            prompt=request.prompt,
            generated=[],
            eos_token_ids=eos,
            seed=derive_seed(self.config.seed, request.request_id),
        )
        detokenizer = Detokenizer(self.tokenizer, request.params.skip_special_tokens, request.prompt)
        return Job(sequence, sampler, Transcript(detokenizer, request.params, eos))

    def _job_of(self, sequence: Sequence) -> Job:
        return self._jobs[sequence.request.request_id]

    def _commit(self, batch: Batch, result: StepResult) -> list[Output]:
        """Add a step's results to its sequences. Returns progress of prompts and new tokens."""
        for sequence, reads, coverage in zip(batch.sequences, result.reads, result.coverage, strict=True):
            sequence.reads[batch.phase] += reads
            sequence.coverage[batch.phase] += coverage
            sequence.traffic[batch.phase] += result.traffic // len(batch.sequences)
        for sequence, locality in zip(batch.sequences, result.locality, strict=True):
            sequence.locality += locality
        sampled = batch.sampled
        self.scheduler.commit(batch, [token for token, _ in result.sampled])
        outputs: list[Output] = []
        for sequence in batch.sequences:
            outputs += self._job_of(sequence).progress()
        for sequence, choice in zip(sampled, result.sampled, strict=True):
            output, reason = self._job_of(sequence).push(choice)
            outputs += [output] if reason is None else [output, self._finish(self._job_of(sequence), reason)]
        return outputs

    def _finish(self, job: Job, reason: FinishReason, failure: Failure | None = None) -> Finish:
        del self._jobs[job.request_id]
        self.scheduler.finish(job.sequence)
        self._retire_index(job.sequence)
        return job.finish(reason, failure)


def _strategy(name: str, arguments: tuple[str, ...]) -> Strategy:
    try:
        return parse(name, arguments)
    except StrategyError as error:
        raise InvalidRequest(error.field, error.problem) from None
