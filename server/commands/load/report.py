"""What a load run has measured, under the field names of vLLM's serving benchmark."""

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
"""What a service level may be stated for."""
WHOLE = {FinishReason.STOP, FinishReason.LENGTH}


@dataclass(slots=True)
class Record:
    """One request as its caller saw it. Moments are seconds since the run began, spans are seconds."""

    number: int
    sent: float
    """When the arrival process let it go, whatever it took to get it onto the wire."""
    input_len: int = 0
    """Tokens of its prompt: those that were asked for, until the server tells."""
    output_len: int = 0
    first: float | None = None
    """When its first token came."""
    last: float = 0.0
    itl: list[float] = field(default_factory=list)
    """One for each token after the first message: the gap since the message before, over the message's tokens."""
    ended: float = 0.0
    error: str = ""
    text: str = ""
    finish: Finish | None = None

    def hear(self, output: Output, now: float) -> None:
        """Takes down what the server says."""
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
        """It is over: by an error, or well if the server has said so."""
        self.ended = now
        if not error and self.finish is None:
            error = "the stream ended early"
        elif not error and self.finish is not None and self.finish.reason not in WHOLE:
            error = self.finish.error or self.finish.reason.value
        elif not error and self.first is None:
            error = "no token came"
        self.error = error

    @property
    def ttft(self) -> float:
        return 0.0 if self.first is None else self.first - self.sent

    @property
    def e2el(self) -> float:
        """From being sent to the last token."""
        return 0.0 if self.first is None else self.last - self.sent

    @property
    def tpot(self) -> float | None:
        """None where there is only one token, so nothing to divide by."""
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None


Targets = dict[str, float]
"""Milliseconds by their names, which are among `TARGETS`."""


def parse_targets(pairs: Sequence[str]) -> Targets:
    """``("ttft:500", "tpot:50")`` as numbers. Raises `InvalidRequest` naming the pair that is none."""
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
    """Whether it came back whole and met every target; one token alone meets any target for those behind it."""
    return not record.error and all(1e3 * (getattr(record, name) or 0.0) <= limit for name, limit in targets.items())


def report(records: Sequence[Record], targets: Targets, duration: float) -> dict[str, Any]:
    """Throughput [1/s], percentiles [ms] over the requests that came back whole, then every request by number [s]."""
    done = [record for record in records if not record.error]
    read, written = sum(record.input_len for record in done), sum(record.output_len for record in done)
    good = sum(is_good(record, targets) for record in done)
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": _rate(len(done), duration),
        "request_goodput": _rate(good, duration) if targets else None,
        "output_throughput": _rate(written, duration),
        "total_token_throughput": _rate(read + written, duration),
        "max_concurrent_requests": most_at_once(records),
        **_statistics(done),
        **_sparsity(done),
        **_each(records),
    }


def _rate(count: int, duration: float) -> float:
    return count / duration if duration > 0 else 0.0


def most_at_once(records: Sequence[Record]) -> int:
    """Requests that were under way at the same time; one that is sent when another ends takes its place."""
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
    """Mean densities and summed bytes, as the server measured them; the first token comes from the prompt."""
    told = [record.finish for record in done if record.finish is not None]
    sparsities = [finish.sparsity for finish in told]
    decoded = [finish.sparsity for finish in told if finish.usage.completion_tokens > 1]
    moved = {name: sum(getattr(each, name) for each in sparsities) for name in ("kv_bytes_read", "kv_bytes_moved")}
    return {
        "strategy": "/".join(sorted({each.strategy for each in sparsities})),
        "prefill_density": statistics.fmean(each.prefill_density for each in sparsities) if sparsities else None,
        "decode_density": statistics.fmean(each.decode_density for each in decoded) if decoded else None,
        **moved,
        "dense_fallbacks": sum(each.dense_fallback for each in sparsities),
        "total_cached_tokens": sum(finish.usage.cached_tokens for finish in told),
    }


def _each(records: Sequence[Record]) -> dict[str, list[Any]]:
    """One value for each request; an `errors` entry is empty where there was none."""
    return {
        "input_lens": [record.input_len for record in records],
        "output_lens": [0 if record.error else record.output_len for record in records],
        "ttfts": [record.ttft for record in records],
        "itls": [record.itl for record in records],
        "start_times": [record.sent for record in records],
        "errors": [record.error for record in records],
    }
