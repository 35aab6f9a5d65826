"""Mean, median, standard deviation and 99th percentile, under the names of vLLM's serving benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def percentiles(metric: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and 99th percentile in milliseconds; None without values."""
    names = [f"{kind}_{metric}_ms" for kind in ("mean", "median", "std", "p99")]
    if not seconds:
        return dict.fromkeys(names)
    ms = [1e3 * value for value in seconds]
    return dict(zip(names, (statistics.fmean(ms), statistics.median(ms), statistics.pstdev(ms), p99(ms)), strict=True))


def p99(values: Sequence[float]) -> float:
    """The 99th percentile, linearly interpolated."""
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]
