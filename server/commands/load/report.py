"""Report of a load run, with the field names of vLLM's serving benchmark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from keysift.engine.errors import InvalidRequest
from keysift.engine.measure.percentiles import percentiles
from keysift.engine.request import Finish, FinishReason, Output, PromptInfo, TokenOutput

TARGETS = ("ttft", "tpot", "e2el")
"""Metrics that a service level may bound."""
COMPLETE = {FinishReason.STOP, FinishReason.LENGTH}


@dataclass(slots=True)
class Record:
    """One request as the client saw it. Moments are seconds since the start of the run, spans are seconds."""

    number: int
    sent: float
    """Moment of its arrival, before any delay in this client."""
    input_len: int = 0
    """Tokens of its prompt: the requested number, until the server reports its own."""
    output_len: int = 0
    first: float | None = None
    """Moment of its first token."""
    last: float = 0.0
    itl: list[float] = field(default_factory=list)
    """One value for each token after the first message: time since the previous message / tokens of the message."""
    ended: float = 0.0
    error: str = ""
    text: str = ""
    finish: Finish | None = None

    def add(self, output: Output, now: float) -> None:
        """Record one output of the server."""
        if isinstance(output, PromptInfo):
            self.input_len = output.prompt_tokens
        elif isinstance(output, TokenOutput) and (count := len(output.token_ids)):
            if self.first is None:
                self.first = now
            else:
                self.itl += [(now - self.last) / count] * count
            self.last, self.output_len, self.text = now, self.output_len + count, self.text + output.text
        elif isinstance(output, Finish):
            self.finish = output

    def end(self, now: float, error: str = "") -> None:
        """Close the record; without `error`, the last output must be a complete finish with at least one token."""
        self.ended = now
        if not error and self.finish is None:
            error = "the stream ended early"
        elif not error and self.finish is not None and self.finish.reason not in COMPLETE:
            error = self.finish.error or self.finish.reason.value
        elif not error and self.first is None:
            error = "no token came"
        self.error = error

    @property
    def ttft(self) -> float:
        return 0.0 if self.first is None else self.first - self.sent

    @property
    def e2el(self) -> float:
        """Arrival to the last token [s]."""
        return 0.0 if self.first is None else self.last - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean time of a token after the first [s]; None for a single token."""
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None


Targets = dict[str, float]
"""Name out of `TARGETS` -> milliseconds."""


def parse_targets(pairs: Sequence[str]) -> Targets:
    """``("ttft:500", "tpot:50")`` as numbers. Raises `InvalidRequest` naming the pair that does not parse."""
    targets: Targets = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in TARGETS or not limit > 0:
            raise InvalidRequest("goodput", f"{', '.join(TARGETS)}, a colon and milliseconds, got {pair!r}")
        targets[name] = limit
    return targets


def is_good(record: Record, targets: Targets) -> bool:
    """True for a complete request that met every target; a single token meets any TPOT target."""
    return not record.error and all(1e3 * (getattr(record, name) or 0.0) <= limit for name, limit in targets.items())


def report(records: Sequence[Record], targets: Targets, duration: float) -> dict[str, Any]:
    """Throughput [1/s] and percentiles [ms] over the complete requests, then every request by number [s]."""
    done = [record for record in records if not record.error]
    inputs, outputs = sum(record.input_len for record in done), sum(record.output_len for record in done)
    good = sum(is_good(record, targets) for record in done)
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": _rate(len(done), duration),
        "request_goodput": _rate(good, duration) if targets else None,
        "output_throughput": _rate(outputs, duration),
        "total_token_throughput": _rate(inputs + outputs, duration),
        "max_concurrent_requests": max_concurrent(records),
        **_statistics(done),
        **_sparsity(done),
        **_each(records),
    }


def _rate(count: int, duration: float) -> float:
    return count / duration if duration > 0 else 0.0


def max_concurrent(records: Sequence[Record]) -> int:
    """Largest number of requests at the same time; one that is sent when another ends takes its place."""
    changes = sorted(change for record in records for change in ((record.sent, 1), (record.ended, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _statistics(done: Sequence[Record]) -> dict[str, float | None]:
    values = {
        "ttft": [record.ttft for record in done],
        "tpot": [record.tpot for record in done if record.tpot is not None],
        "itl": [gap for record in done for gap in record.itl],
        "e2el": [record.e2el for record in done],
    }
    return {name: value for metric, seconds in values.items() for name, value in percentiles(metric, seconds).items()}


def _sparsity(done: Sequence[Record]) -> dict[str, Any]:
    """Mean densities and summed bytes, as measured by the server; a completion of one token has no decode step."""
    finishes = [record.finish for record in done if record.finish is not None]
    sparsities = [finish.sparsity for finish in finishes]
    decoded = [finish.sparsity for finish in finishes if finish.usage.completion_tokens > 1]
    moved = {name: sum(getattr(each, name) for each in sparsities) for name in ("kv_bytes_read", "kv_bytes_moved")}
    return {
        "strategy": "/".join(sorted({each.strategy for each in sparsities})),
        "prefill_density": statistics.fmean(each.prefill_density for each in sparsities) if sparsities else None,
        "decode_density": statistics.fmean(each.decode_density for each in decoded) if decoded else None,
        **moved,
        "dense_fallbacks": sum(each.dense_fallback for each in sparsities),
        "total_cached_tokens": sum(finish.usage.cached_tokens for finish in finishes),
    }


def _each(records: Sequence[Record]) -> dict[str, list[Any]]:
    """One value for each request; an entry of `errors` is empty for a complete request."""
    return {
        "input_lens": [record.input_len for record in records],
        "output_lens": [0 if record.error else record.output_len for record in records],
        "ttfts": [record.ttft for record in records],
        "itls": [record.itl for record in records],
        "start_times": [record.sent for record in records],
        "errors": [record.error for record in records],
    }
