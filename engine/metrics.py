"""Prometheus metrics of this process, under vLLM's names with the prefix ``keysift_``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec

from prometheus_client import Counter, Gauge, Histogram

from keysift.kvcache import Phase

from .request import EngineStatus, Finish, FinishReason
from .scheduling.sequence import Sequence

P = ParamSpec("P")

logger = logging.getLogger(__name__)

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_BY_STRATEGY = ("strategy",)


def _seconds(name: str, help: str) -> Histogram:
    return Histogram(f"keysift_{name}_seconds", help, _BY_STRATEGY, buckets=_SECONDS)


def _counter(name: str, help: str) -> Counter:
    return Counter(f"keysift_{name}", help, _BY_STRATEGY)


TIME_TO_FIRST_TOKEN = _seconds("time_to_first_token", "Arrival to first token")
INTER_TOKEN_LATENCY = _seconds("inter_token_latency", "Mean time between two tokens of a request")
E2E_REQUEST_LATENCY = _seconds("e2e_request_latency", "Arrival to last token")
REQUEST_QUEUE_TIME = _seconds("request_queue_time", "Arrival to first step")
RUNNING = Gauge("keysift_num_requests_running", "Requests that hold pages")
WAITING = Gauge("keysift_num_requests_waiting", "Requests in the queue")
KV_CACHE_USAGE = Gauge("keysift_kv_cache_usage_perc", "Share of the KV pages in use, 1 = all")
PREEMPTIONS = _counter("num_preemptions_total", "Preemptions: a request freed its pages and was computed again")
PREFIX_QUERIES = _counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache")
PREFIX_HITS = _counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache")
PROMPT_TOKENS = _counter("prompt_tokens_total", "Prompt tokens processed")
GENERATION_TOKENS = _counter("generation_tokens_total", "Tokens generated")
DENSITY = {
    phase: Histogram(f"keysift_{phase.value}_density", "Share of the causal pairs read", _BY_STRATEGY, buckets=_SHARES)
    for phase in Phase
}
COVERAGE = Histogram("keysift_attention_coverage", "Attention mass kept, mean", _BY_STRATEGY, buckets=_SHARES)
COVERAGE_MIN = Histogram(
    "keysift_attention_coverage_min", "Attention mass kept, lowest probe and head", _BY_STRATEGY, buckets=_SHARES
)
WIDENED = Histogram(
    "keysift_widened_share", "Share of the probed rows that were widened to everything", _BY_STRATEGY, buckets=_SHARES
)
KV_BYTES_MOVED = _counter("kv_bytes_moved_total", "KV bytes read from the backing store")
KV_BYTES_WRITTEN = _counter("kv_bytes_written_total", "KV bytes written to the backing store")
KV_TIER_HITS = _counter("kv_tier_hits_total", "Pages of a layer and head that decode steps found in the pool")
KV_TIER_MISSES = _counter("kv_tier_misses_total", "Pages of a layer and head that decode steps had to fetch")
REQUEST_FAILURES = Counter(
    "keysift_request_failures_total", "Requests that an error ended: exhausted or broken", (*_BY_STRATEGY, "kind")
)
DENSE_FALLBACK = _counter("dense_fallback_total", "Requests that ran dense below a strategy's crossover")


def _harmless(observe: Callable[P, None]) -> Callable[P, None]:
    """Log what an observation raises: counting must not end what it counts."""

    @functools.wraps(observe)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            observe(*args, **kwargs)
        except Exception:
            logger.exception("a metric was not counted")

    return call


@_harmless
def observe_status(status: EngineStatus) -> None:
    """Set the gauges to the engine's state."""
    RUNNING.set(status.running)
    WAITING.set(status.waiting)
    KV_CACHE_USAGE.set(1 - status.pages_free / status.pages_total)


@_harmless
def observe_finish(finish: Finish, sequence: Sequence) -> None:
    """Count a finished request."""
    label, timings, usage, sparsity = finish.sparsity.strategy, finish.timings, finish.usage, finish.sparsity
    looked_up = usage.prompt_tokens if sequence.keys and sequence.started else 0
    PROMPT_TOKENS.labels(label).inc(max(sequence.reported, 0))
    GENERATION_TOKENS.labels(label).inc(usage.completion_tokens)
    PREEMPTIONS.labels(label).inc(sequence.preemptions)
    PREFIX_QUERIES.labels(label).inc(looked_up)
    PREFIX_HITS.labels(label).inc(usage.cached_tokens)
    REQUEST_QUEUE_TIME.labels(label).observe(timings.queue_ms / 1e3)
    KV_BYTES_MOVED.labels(label).inc(sparsity.kv_bytes_moved)
    KV_BYTES_WRITTEN.labels(label).inc(sparsity.kv_bytes_written)
    KV_TIER_HITS.labels(label).inc(sparsity.kv_hits)
    KV_TIER_MISSES.labels(label).inc(sparsity.kv_misses)
    DENSE_FALLBACK.labels(label).inc(sparsity.dense_fallback)
    if finish.reason is FinishReason.ERROR:
        REQUEST_FAILURES.labels(label, "exhausted" if finish.exhausted else "broken").inc()
    if usage.completion_tokens:
        TIME_TO_FIRST_TOKEN.labels(label).observe(timings.ttft_ms / 1e3)
        E2E_REQUEST_LATENCY.labels(label).observe((timings.ttft_ms + timings.decode_ms) / 1e3)
        DENSITY[Phase.PREFILL].labels(label).observe(sparsity.prefill_density)
    if usage.completion_tokens > 1:
        INTER_TOKEN_LATENCY.labels(label).observe(timings.tpot_ms / 1e3)
        DENSITY[Phase.DECODE].labels(label).observe(sparsity.decode_density)
    if sparsity.coverage is not None and sparsity.coverage_min is not None:
        COVERAGE.labels(label).observe(sparsity.coverage)
        COVERAGE_MIN.labels(label).observe(sparsity.coverage_min)
        WIDENED.labels(label).observe(sparsity.widened)
