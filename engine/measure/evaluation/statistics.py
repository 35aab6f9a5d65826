"""Confidence intervals and standard errors of means over few samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev


def interval(scores: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for the mean of scores [n] between 0 and 1.

    Made for scores that are 0 or 1, it holds for all between: with a mean of p their variance is at most p(1-p), that
    of zeros and ones, so for shares it is rather too wide. It is informative for equal scores, too.
    """
    if not scores:
        raise ValueError("scores: at least one is needed, got none")
    if outside := [score for score in scores if not 0 <= score <= 1]:
        raise ValueError(f"scores: lie between 0 and 1, got {outside[0]}")
    if not 0 < level < 1:
        raise ValueError(f"level: lies between 0 and 1, got {level}")
    count, mean = len(scores), fmean(scores)
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = mean + z * z / (2 * count)
    reach = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # At a mean of 0 or 1 that bound is exact, but rounding may step over it.
    return max((middle - reach) / scale, 0.0), min((middle + reach) / scale, 1.0)


def paired(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of paired differences [n]; the error of a single one is infinite."""
    if not differences:
        raise ValueError("differences: at least one is needed, got none")
    mean = fmean(differences)
    return mean, stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf


def perplexity_change(differences: Sequence[float]) -> tuple[float, float]:
    """Relative change of perplexity, and its standard error.

    From differences [n] in nats, token by token, of negative log-likelihoods. The error is that of their mean times the
    slope of the exponential there, as if tokens were independent.
    """
    mean, error = paired(differences)
    return math.expm1(mean), math.exp(mean) * error
