"""Engine: continuous batching of requests over one model, one forward pass at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from keysift.attention import Spans, Strategy
from keysift.kvcache import OffloadError, OutOfFrames, Span

from . import metrics
from .calibration import calibration
from .config import EngineConfig
from .errors import DuplicateRequest, ResourceExhausted
from .execution.forward import StepResult
from .execution.sampler import Sampled
from .execution.watch import watched_tier
from .job import Job
from .memory.budget import make_cache
from .model.load import load
from .parallel.group import assemble
from .preparation import Preparation, parsed
from .request import EngineStatus, Finish, FinishReason, Output, Request
from .scheduling.batch import Batch
from .scheduling.failures import Failure, failure_of
from .scheduling.scheduler import Scheduler
from .scheduling.sequence import Sequence


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
        parsed(config.strategy, config.strategy_args)  # refuse a wrong name before loading
        self.group = assemble(config, report)
        with self.group.failure_scope():
            self._load(report)
        self._jobs: dict[str, Job] = {}
        self._outbox: list[Output] = []

    def _load(self, report: Callable[[str], None]) -> None:
        config = self.config
        self.model = load(config, report)
        crossovers = calibration.crossovers(config, self.model)
        self.tokenizer = self.model.tokenizer
        self.cache = make_cache(config, self.model, report, self.group.cache_type)
        self.preparation = Preparation(config, self.model, self.cache, crossovers)
        calibration.announce(config, crossovers, report)
        self.scheduler = Scheduler(
            self.cache,
            max_running=config.max_num_seqs,
            chunk=config.prefill_chunk,
            queries_per_row=config.queries_per_row,
            patience=config.patience,
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

    @property
    def default(self) -> Strategy:
        """Strategy of requests that name none."""
        return self.preparation.default

    def strategy(self, name: str, arguments: tuple[str, ...] = ()) -> Strategy:
        """Strategy of a name, checked against the model and the cache.

        Options that `arguments` do not state come from the model's configuration, `dense_below` from the calibration of
        this machine. Raises `InvalidRequest` or `Unsupported` naming what is wrong.
        """
        return self.preparation.strategy(name, arguments)

    def prepare(self, request: Request) -> Job:
        """The job of a request, for `add`: everything that costs time before its first step. On any thread.

        Raises:
            InvalidRequest: a field is out of bounds.
            ResourceExhausted: the request can never fit into the cache.
            Unsupported: its strategy does not fit the model or the cache.
        """
        return self.preparation.job(request)

    def add(self, request: Request | Job) -> None:
        """Queue a request, prepared or not.

        Raises:
            DuplicateRequest: a live request has this id.
            ResourceExhausted: the queue is full.
            And, if it was not prepared, what `prepare` raises.
        """
        self._check_place(request.request_id)
        job = request if isinstance(request, Job) else self.prepare(request)
        self._jobs[job.request_id] = job
        self.scheduler.add(job.sequence)

    def check(self, request: Request) -> None:
        """Raise what `prepare` raises."""
        self.preparation.check(request)

    def abort(self, request_id: str) -> bool:
        """End a request now and free its pages; its `Finish` comes with the next step's outputs. False: unknown id."""
        if (job := self._jobs.get(request_id)) is None:
            return False
        self._outbox.append(self._finish(job, FinishReason.CANCELLED))
        return True

    def step(self) -> list[Output]:
        """Run one forward pass, if there is work, and return its outputs.

        A request that fails, by whatever its strategy, its tokens or its pages do, ends with `FinishReason.ERROR`; the
        others continue. Raises only if the engine itself cannot run a token any more.
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
        """End the other ranks and work in the background, if there is any. The engine cannot run after that."""
        self.group.close()
        self.cache.close()

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
            cause = error if failure.unexpected and len(batch.sequences) == 1 else None
        else:
            return self._commit(batch, result)
        if len(batch.sequences) > 1:  # outside the handler, as the error keeps the failed step's tensors alive
            return [output for part in batch.alone() for output in self._run(part)]
        self.scheduler.fail(batch.sequences[0], failure)
        if cause is not None:
            self._check_health(cause)
        return []

    def _check_health(self, cause: Exception) -> None:
        """Raise if one token cannot run: then the engine is broken, and not the request that `cause` ended."""
        try:
            self.runner.rehearse()
        except (OutOfFrames, OffloadError):
            pass  # the others hold all pages, or the store fails, which ends the requests that meet it: they go on
        except Exception as error:
            raise error from cause

    def _check_place(self, request_id: str) -> None:
        """Raises `DuplicateRequest` for the id of a live request and `ResourceExhausted` if the queue is full."""
        if request_id in self._jobs:
            raise DuplicateRequest(f"request_id: {request_id!r} is that of a live request")
        if len(self._jobs) >= (room := self.config.max_num_seqs + self.config.max_queue):
            raise ResourceExhausted(
                f"max_queue: {len(self._jobs)} requests are running or waiting, at most {room}", retry_after_s=1.0
            )

    def _job_of(self, sequence: Sequence) -> Job:
        return self._jobs[sequence.request.request_id]

    def _commit(self, batch: Batch, result: StepResult) -> list[Output]:
        """Add a step's results to its sequences. Returns progress of prompts and new tokens."""
        sampled = dict(zip(batch.sampled, result.sampled, strict=True))
        now = time.monotonic()
        outputs: list[Output] = []
        for place, sequence in enumerate(batch.sequences):
            try:
                sequence.count(batch.phase, result.statistics(place))
                outputs += self._advance(sequence, batch.spans[place], sampled.get(sequence), now)
            except Exception as error:
                self.scheduler.fail(sequence, failure_of(error, batch.title))
        return outputs

    def _advance(self, sequence: Sequence, span: Span, choice: Sampled | None, now: float) -> list[Output]:
        """Outputs of one sequence of a finished step, its finish included."""
        job = self._job_of(sequence)
        self.scheduler.commit(sequence, span, None if choice is None else choice.token_id, now)
        outputs = job.progress()
        if choice is not None:
            output, reason = job.push(choice)
            outputs += [output] if reason is None else [output, self._finish(job, reason)]
        return outputs

    def _finish(self, job: Job, reason: FinishReason, failure: Failure | None = None) -> Finish:
        finish = job.finish(reason, failure)
        del self._jobs[job.request_id]
        self.scheduler.finish(job.sequence)
        return finish
