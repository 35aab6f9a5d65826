"""Summary of a cell's runs, with vLLM's field names where it has them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ..percentiles import percentiles
from .drive import Run

METRICS = ("ttft", "tpot", "itl", "e2el")


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Latencies, throughput, densities and bytes over all requests of all runs."""
    finishes = [finish for run in runs for finish in run.finishes]
    reported = [finish.sparsity for finish in finishes]
    return {
        **{f"{name}_ms": _range([statistics.median(_values(run, name)) for run in runs]) for name in METRICS},
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
        "prefill_density": statistics.fmean(sparsity.prefill_density for sparsity in reported),
        "decode_density": statistics.fmean(sparsity.decode_density for sparsity in reported),
        "coverage": _mean(sparsity.coverage for sparsity in reported),
        "kv_bytes_read": sum(sparsity.kv_bytes_read for sparsity in reported) // len(runs),
        "kv_bytes_moved": sum(sparsity.kv_bytes_moved for sparsity in reported) // len(runs),
    }


def _values(run: Run, metric: str) -> list[float]:
    """Seconds of one metric, over all requests of a run."""
    if metric == "itl":
        return [gap for gaps in run.itls for gap in gaps]
    return {"ttft": run.ttfts, "tpot": run.tpots, "e2el": run.e2els}[metric]


def _range(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the runs, in milliseconds."""
    return {
        "median": 1e3 * statistics.median(seconds),
        "min": 1e3 * min(seconds),
        "max": 1e3 * max(seconds),
    }


def _throughput(runs: Sequence[Run]) -> dict[str, float]:
    """Requests and tokens per second, over the total duration of the runs."""
    duration = sum(run.duration for run in runs)
    usages = [finish.usage for run in runs for finish in run.finishes]
    generated = sum(usage.completion_tokens for usage in usages)
    return {
        "request_throughput": len(usages) / duration,
        "output_throughput": generated / duration,
        "total_token_throughput": (generated + sum(usage.prompt_tokens for usage in usages)) / duration,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
