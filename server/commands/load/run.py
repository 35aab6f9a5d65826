"""Load on a running server: requests that arrive at random, and what their callers have to wait for.

- TTFT: from being sent to the first token.
- ITL: between two messages, divided by the tokens of the second; one for each of its tokens.
- TPOT: (E2EL - TTFT) / (tokens - 1).
- E2EL: from being sent to the last token.
- Goodput: requests a second that came back whole and met every target.

A request is sent when the arrival process says so, not when this program gets round to it. Where ``max_concurrency``
holds it back, that is when there is room for it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime
from itertools import accumulate, cycle, islice
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from keysift.engine.errors import KeysiftError
from keysift.engine.request import SamplingParams

from ...client import Client, connect
from ...options import Remote, pair
from ..generate import report as say
from . import prompts
from .prompts import Ask
from .report import Record, parse_targets, report

Hear = Callable[[int, int], None]
"""Is told how many requests have ended, and how many of them have failed."""
FIRST_SEED = 2**32
"""Prompts and arrivals of one seed are drawn apart, so that more prompts do not change when they arrive."""


class Load(Remote):
    """What is sent to a running server, and when."""

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
        None, ge=1, description="most requests under way at once, further ones wait here; none: any number"
    )
    input_lens: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1024,), min_length=1, description="tokens of a prompt, repeatable: prompts take turns at them"
    )
    output_len: int = Field(128, ge=1, description="tokens of an answer")
    ignore_eos: bool = Field(True, description="answers go on behind their end, so that all are equally long")
    prompts: Path | None = Field(
        None,
        description="JSONL of prompts to send instead, each with prompt or messages; input_lens is for none of them",
    )
    num_warmups: int = Field(1, ge=0, description="requests before all others, of which nothing is reported")
    goodput: tuple[str, ...] = Field(
        (), description="ttft:MS, tpot:MS or e2el:MS that a good request meets, repeatable"
    )
    strategy: str = Field("", description="attention strategy of the requests; empty: the server's own")
    strategy_args: tuple[str, ...] = Field((), description="NAME.FIELD=VALUE, repeatable")
    bypass_prefix_cache: bool = Field(True, description="no request profits from another's prompt")
    seed: int = Field(0, ge=0, description="of the arrivals and of the prompts' places in the text")
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


def load(config: Load, hear: Hear | None = None) -> dict[str, Any]:
    """Run the load and report it; `hear` is told how far it is, else a progress bar on standard error is.

    A request that fails is counted with its error and the others go on; those of the warm-up go to standard error.
    Ctrl-C ends the run, and what came back by then is reported. Raises `InvalidRequest` for a bad field, `Unavailable`
    where no server answers at all, `KeysiftError` where the whole warm-up fails, and what else `Client.info` raises.
    """
    begun = datetime.now()
    with connect(config) as client:
        info = client.info()
        real, warm = _asks(config, client, info.max_model_len)
        offsets = arrivals(len(real), config.request_rate, config.burstiness, config.seed)
        run = _Run(client, config, lambda done, failed: None)
        with _Bar(len(real)) if hear is None else nullcontext(hear) as tell:
            run.go(warm, [0.0] * len(warm))
            if not run.interrupted:
                _check_warm_up(run.records)
                run = _Run(client, config, tell)
                run.go(real, offsets)
            else:
                run.records.clear()
    facts = {"date": begun.strftime("%Y%m%d-%H%M%S"), "backend": "keysift", "model_id": info.model}
    return {**facts, **_settings(config), "interrupted": run.interrupted, **run.report()}


def _asks(config: Load, client: Client, max_model_len: int) -> tuple[list[Ask], list[Ask]]:
    """Those that count, and those of the warm-up, which begins with the first line or length as well."""
    counts = (config.num_prompts, config.num_warmups)
    if config.prompts is not None:
        given = prompts.read(config.prompts)
        real, warm = (list(islice(cycle(given), count)) for count in counts)
        return real, warm
    lengths = [length for count in counts for length in islice(cycle(config.input_lens), count)]
    asks = prompts.cut(lengths, config.seed, prompts.token_size(client, max_model_len))
    return asks[: config.num_prompts], asks[config.num_prompts :]


def _check_warm_up(records: Sequence[Record]) -> None:
    """Tells what failed; raises it where nothing came back, as the requests that count are no better."""
    errors = [record.error for record in records if record.error]
    if not errors:
        return
    problem = f"{len(errors)} of {len(records)} warm-up requests failed: {'; '.join(dict.fromkeys(errors))}"
    if len(errors) == len(records):
        raise KeysiftError(problem)
    say(problem)


def _settings(config: Load) -> dict[str, Any]:
    rate = config.request_rate
    return {
        "num_prompts": config.num_prompts,
        "request_rate": "inf" if math.isinf(rate) else rate,  # JSON has no such number
        "burstiness": config.burstiness,
        "max_concurrency": config.max_concurrency,
        "seed": config.seed,
    }


class _Run:
    """Sends requests when they are due, each from a thread of its own."""

    def __init__(self, client: Client, config: Load, hear: Hear) -> None:
        self._client = client
        self._config = config
        self._hear = hear
        self._places: SimpleQueue[float] | None = SimpleQueue() if config.max_concurrency else None
        self._lock = Lock()
        self._threads: list[Thread] = []
        self._begun = 0.0
        self._failed = 0
        self.records: list[Record] = []
        self.interrupted = False

    def go(self, asks: Sequence[Ask], offsets: Sequence[float]) -> None:
        """Send everything and wait for it; Ctrl-C ends what is under way, on the server too."""
        self._begun = time.perf_counter()
        try:
            self._send(asks, offsets)
            self._wait()
        except KeyboardInterrupt:
            self.interrupted = True
            self._client.close()
            self._wait()

    def report(self) -> dict[str, Any]:
        records = sorted(self.records, key=lambda record: record.number)
        duration = max((record.ended for record in records), default=0.0)
        texts = {"generated_texts": [record.text for record in records]} if self._config.generated_texts else {}
        return {**report(records, parse_targets(self._config.goodput), duration), **texts}

    def _send(self, asks: Sequence[Ask], offsets: Sequence[float]) -> None:
        for _ in range(self._config.max_concurrency or 0):
            self._leave(0.0)
        due = 0.0
        for number, (ask, offset) in enumerate(zip(asks, offsets, strict=True)):
            due = max(due, offset)  # requests leave in order: one that is held back holds up those behind it
            time.sleep(max(0.0, due - self._now()))
            if self._places is not None:
                due = max(due, self._places.get())
            thread = Thread(target=self._ask, args=(ask, Record(number, due, ask.length or 0)))
            thread.start()
            self._threads.append(thread)

    def _wait(self) -> None:
        for thread in self._threads:
            thread.join()

    def _now(self) -> float:
        return time.perf_counter() - self._begun

    def _ask(self, ask: Ask, record: Record) -> None:
        error = ""
        try:
            self._listen(ask, record)
        except Exception as problem:  # whatever it was, the others go on
            error = f"{type(problem).__name__}: {problem}"
        record.end(self._now(), error)
        try:
            self._keep(record)
        finally:
            self._leave(record.ended)

    def _leave(self, now: float) -> None:
        """From this moment on there is room for one more request."""
        if self._places is not None:
            self._places.put(now)

    def _listen(self, ask: Ask, record: Record) -> None:
        config = self._config
        outputs = self._client.generate(
            ask.prompt,
            SamplingParams(max_new_tokens=config.output_len, ignore_eos=config.ignore_eos),
            strategy=config.strategy,
            strategy_args=dict(pair(argument) for argument in config.strategy_args),
            bypass_prefix_cache=config.bypass_prefix_cache,
            truncate_prompt_tokens=ask.length,
        )
        for output in outputs:
            record.hear(output, self._now())

    def _keep(self, record: Record) -> None:
        """Books the record, unless it was Ctrl-C that ended it."""
        with self._lock:
            if self.interrupted and record.error:
                return
            self.records.append(record)
            self._failed += bool(record.error)
            self._hear(len(self.records), self._failed)


class _Bar:
    """A bar on standard error, where that is a terminal."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("requests", total=total)

    def __enter__(self) -> Hear:
        self._bar.start()
        return self._show

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _show(self, done: int, failed: int) -> None:
        self._bar.update(self._task, completed=done, description=f"requests, {failed} failed" if failed else "requests")
