"""The numbers of a cell out of its runs. Field names are vLLM's where it has one for the thing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ..percentiles import percentiles
from .drive import Run

METRICS = ("ttft", "tpot", "itl", "e2el")


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Latencies, throughput and what was read, over all requests of all runs."""
    finishes = [finish for run in runs for finish in run.finishes]
    told = [finish.sparsity for finish in finishes]
    return {
        **{f"{name}_ms": _spread([statistics.median(_values(run, name)) for run in runs]) for name in METRICS},
        "prefill_latency": statistics.median(sum(run.seconds("prefill")) for run in runs),
        "decode_latency": statistics.median(seconds for run in runs for seconds in run.seconds("decode")),
        **{
            key: value
            for name in METRICS
            for key, value in percentiles(name, [x for run in runs for x in _values(run, name)]).items()
        },
        **_throughput(runs),
        "ttfts": [seconds for run in runs for seconds in run.ttfts],
        "itls": [gaps for run in runs for gaps in run.itls],
        "input_lens": [finish.usage.prompt_tokens for finish in finishes],
        "output_lens": [finish.usage.completion_tokens for finish in finishes],
        "prefill_density": statistics.fmean(sparsity.prefill_density for sparsity in told),
        "decode_density": statistics.fmean(sparsity.decode_density for sparsity in told),
        "coverage": _mean(sparsity.coverage for sparsity in told),
        "kv_bytes_read": sum(sparsity.kv_bytes_read for sparsity in told) // len(runs),
        "kv_bytes_moved": sum(sparsity.kv_bytes_moved for sparsity in told) // len(runs),
    }


def _values(run: Run, metric: str) -> list[float]:
    """Seconds."""
    if metric == "itl":
        return [gap for gaps in run.itls for gap in gaps]
    return {"ttft": run.ttfts, "tpot": run.tpots, "e2el": run.e2els}[metric]


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Over runs, in milliseconds."""
    return {
        "median": 1e3 * statistics.median(seconds),
        "min": 1e3 * min(seconds),
        "max": 1e3 * max(seconds),
    }


def _throughput(runs: Sequence[Run]) -> dict[str, float]:
    """Per second, over the runs one after the other."""
    duration = sum(run.duration for run in runs)
    usages = [finish.usage for run in runs for finish in run.finishes]
    said = sum(usage.completion_tokens for usage in usages)
    return {
        "request_throughput": len(usages) / duration,
        "output_throughput": said / duration,
        "total_token_throughput": (said + sum(usage.prompt_tokens for usage in usages)) / duration,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
