"""Load generator: sends requests to a running server at random arrivals, and times the replies.

- TTFT: arrival to the first token.
- ITL: time between two messages, divided by the tokens of the second; one for each of its tokens.
- TPOT: (E2EL - TTFT) / (tokens - 1).
- E2EL: arrival to the last token.
- Goodput: complete requests a second that met every target.

A request counts from the moment that the arrival process has drawn for it, not from the moment that it is on the wire.
Under ``max_concurrency`` that is the moment at which an earlier request makes room for it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from itertools import accumulate, cycle, islice
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from pydantic import Field

from keysift.engine.errors import KeysiftError
from keysift.engine.measure.profiling.settings import Counts
from keysift.engine.request import SamplingParams

from ...client import Client, connect
from ...options import Remote, pair
from .. import progress
from . import prompts
from .prompts import SizedPrompt
from .report import Record, parse_targets, report

OnProgress = Callable[[int, int], None]
"""Takes the requests that have ended, and those of them that have failed."""
FIRST_SEED = 2**32
"""Arrivals draw from a stream of their own, so that more prompts do not move them."""


class Load(Remote):
    """Requests to a running server, and their arrivals."""

    address: str | None = Field(None, description="host:port of the running server that is put under load")
    num_prompts: int = Field(100, ge=1, description="requests to send")
    request_rate: float = Field(math.inf, gt=0, description="requests a second that arrive; inf: all at once")
    burstiness: float = Field(
        1.0,
        gt=0,
        description="shape of the gamma distribution of the gaps between arrivals; 1: Poisson, less: in bursts, "
        "more: evenly",
    )
    max_concurrency: int | None = Field(
        None, ge=1, description="most requests at once, further ones wait in the client; none: any number"
    )
    input_lens: Counts = Field(
        (1024,), min_length=1, description="tokens of a prompt, repeatable: prompts take turns at them"
    )
    output_len: int = Field(128, ge=1, description="tokens of an answer")
    ignore_eos: bool = Field(True, description="answers go on after their end token, so that all are equally long")
    prompts: Path | None = Field(
        None,
        description="JSONL file of prompts to send instead, each with prompt or messages; they keep their own lengths",
    )
    num_warmups: int = Field(1, ge=0, description="requests before all others, not part of the report")
    goodput: tuple[str, ...] = Field(
        (), description="ttft:MS, tpot:MS or e2el:MS that a good request meets, repeatable"
    )
    strategy: str = Field("", description="attention strategy of the requests; empty: the server's own")
    strategy_args: tuple[str, ...] = Field((), description="NAME.FIELD=VALUE, repeatable")
    bypass_prefix_cache: bool = Field(True, description="no request reuses the prefix of another")
    seed: int = Field(0, ge=0, description="of the arrivals and of the prompts' offsets in the text")
    generated_texts: bool = Field(False, description="report the answers as well")

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        parse_targets(self.goodput)
        for argument in self.strategy_args:
            pair(argument)


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start of the run at which `count` requests arrive, the first one at once."""
    if math.isinf(rate):
        return [0.0] * count
    draw = random.Random(FIRST_SEED + seed)
    gaps = (draw.gammavariate(burstiness, 1.0 / (rate * burstiness)) for _ in range(count - 1))
    return list(accumulate(gaps, initial=0.0))


def load(config: Load, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Run the load and report it; without `on_progress`, a progress bar is on standard error.

    A request that fails is counted with its error and the others go on; those of the warm-up go to standard error.
    Ctrl-C ends the run; the report then covers the requests that had completed. Raises `InvalidRequest` for a bad
    field, `Unavailable` without a server at the address, `KeysiftError` if the whole warm-up fails, and the errors of
    `Client.info`.
    """
    started = datetime.now()
    with connect(config) as client:
        info = client.info()
        counted, warmup = _prompts(config, client, info.max_model_len)
        offsets = arrivals(len(counted), config.request_rate, config.burstiness, config.seed)
        run = _Run(client, config, lambda done, failed: None)
        with nullcontext(on_progress) if on_progress else _bar(len(counted)) as show:
            run.go(warmup, [0.0] * len(warmup))
            if not run.interrupted:
                _check_warmup(run.records)
                run = _Run(client, config, show)
                run.go(counted, offsets)
            else:
                run.records.clear()
    facts = {"date": started.strftime("%Y%m%d-%H%M%S"), "backend": "keysift", "model_id": info.model}
    return {**facts, **_settings(config), "interrupted": run.interrupted, **run.report()}


@contextmanager
def _bar(total: int) -> Iterator[OnProgress]:
    with progress.count_bar("requests", total) as bar:
        yield lambda done, failed: bar.update(done, title=f"requests, {failed} failed" if failed else "requests")


def _prompts(config: Load, client: Client, max_model_len: int) -> tuple[list[SizedPrompt], list[SizedPrompt]]:
    """Prompts that count, and those of the warm-up, which start at the same first line or length."""
    counts = (config.num_prompts, config.num_warmups)
    if config.prompts is not None:
        lines = prompts.read(config.prompts)
        counted, warmup = (list(islice(cycle(lines), count)) for count in counts)
        return counted, warmup
    lengths = [length for count in counts for length in islice(cycle(config.input_lens), count)]
    texts = prompts.cut(lengths, config.seed, prompts.token_size(client, max_model_len, config.priority))
    return texts[: config.num_prompts], texts[config.num_prompts :]


def _check_warmup(records: Sequence[Record]) -> None:
    """Print the errors of the warm-up; raises `KeysiftError` if all of it failed, as the rest would do no better."""
    errors = [record.error for record in records if record.error]
    if not errors:
        return
    problem = f"{len(errors)} of {len(records)} warm-up requests failed: {'; '.join(dict.fromkeys(errors))}"
    if len(errors) == len(records):
        raise KeysiftError(problem)
    progress.report(problem)


def _settings(config: Load) -> dict[str, Any]:
    rate = config.request_rate
    return {
        "num_prompts": config.num_prompts,
        "request_rate": "inf" if math.isinf(rate) else rate,  # JSON has no infinity
        "burstiness": config.burstiness,
        "max_concurrency": config.max_concurrency,
        "seed": config.seed,
    }


class _Run:
    """Sends requests when they are due, each from a thread of its own."""

    def __init__(self, client: Client, config: Load, on_progress: OnProgress) -> None:
        self._client = client
        self._config = config
        self._on_progress = on_progress
        self._freed: SimpleQueue[float] | None = SimpleQueue() if config.max_concurrency else None
        """Under `max_concurrency`, the moments at which a request made room for another."""
        self._lock = Lock()
        self._threads: list[Thread] = []
        self._started = 0.0
        self._failed = 0
        self.records: list[Record] = []
        self.interrupted = False

    def go(self, requests: Sequence[SizedPrompt], offsets: Sequence[float]) -> None:
        """Send all requests and wait for them; Ctrl-C aborts the running ones, on the server too."""
        self._started = time.perf_counter()
        try:
            self._send_all(requests, offsets)
            self._join()
        except KeyboardInterrupt:
            self.interrupted = True
            self._client.close()
            self._join()

    def report(self) -> dict[str, Any]:
        records = sorted(self.records, key=lambda record: record.number)
        duration = max((record.ended for record in records), default=0.0)
        texts = {"generated_texts": [record.text for record in records]} if self._config.generated_texts else {}
        return {**report(records, parse_targets(self._config.goodput), duration), **texts}

    def _send_all(self, requests: Sequence[SizedPrompt], offsets: Sequence[float]) -> None:
        for _ in range(self._config.max_concurrency or 0):
            self._free(0.0)
        due = 0.0
        for number, (request, offset) in enumerate(zip(requests, offsets, strict=True)):
            due = max(due, offset)  # requests leave in order: one that waits for room delays all later ones
            time.sleep(max(0.0, due - self._now()))
            if self._freed is not None:
                due = max(due, self._freed.get())
            thread = Thread(target=self._send, args=(request, Record(number, due, request.length or 0)))
            thread.start()
            self._threads.append(thread)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _now(self) -> float:
        return time.perf_counter() - self._started

    def _send(self, request: SizedPrompt, record: Record) -> None:
        error = ""
        try:
            self._receive(request, record)
        except Exception as problem:  # of any kind: the other requests go on
            error = f"{type(problem).__name__}: {problem}"
        record.end(self._now(), error)
        try:
            self._store(record)
        finally:
            self._free(record.ended)

    def _free(self, now: float) -> None:
        """Make room for one more request from this moment on."""
        if self._freed is not None:
            self._freed.put(now)

    def _receive(self, request: SizedPrompt, record: Record) -> None:
        config = self._config
        outputs = self._client.generate(
            request.prompt,
            SamplingParams(max_new_tokens=config.output_len, ignore_eos=config.ignore_eos),
            strategy=config.strategy,
            strategy_args=dict(pair(argument) for argument in config.strategy_args),
            bypass_prefix_cache=config.bypass_prefix_cache,
            truncate_prompt_tokens=request.length,
            priority=config.priority,
        )
        for output in outputs:
            record.add(output, self._now())

    def _store(self, record: Record) -> None:
        """Keep the record, unless Ctrl-C was what ended it."""
        with self._lock:
            if self.interrupted and record.error:
                return
            self.records.append(record)
            self._failed += bool(record.error)
            self._on_progress(len(self.records), self._failed)
