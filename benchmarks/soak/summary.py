"""Summary of a soak: memory and latency by fifths of its time, endings, and verdicts."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from keysift.engine.measure.percentiles import p99

from .load import Golden, Reading
from .memory import Sample
from .mix import Ending

FIFTHS = 5
FLAT = 0.02
"""Most that RSS may move over the last half, as a share."""
SLOWER = 0.20
"""Most by which the last fifth's p99 may exceed the second's, as a share."""
RESAMPLED = 400
"""Draws of a bootstrap."""
MEANT = {ending.value for ending in Ending}


class Verdict(NamedTuple):
    """One criterion: what was measured, and whether it is met."""

    name: str
    met: bool
    found: str


def summarise(
    samples: dict[str, list[Sample]], readings: Sequence[Reading], golden: Golden, seconds: float
) -> dict[str, Any]:
    """Everything that a report shows, as JSON has it."""
    memory = [memory_row(server, found, seconds) for server, found in samples.items()]
    latency = [
        latency_row(server, metric, [one for one in readings if server in ("all", one.server)], seconds)
        for server in (*samples, "all")
        for metric in ("ttft", "tpot")
    ]
    outcomes = Counter((one.server, one.outcome) for one in readings)
    endings = [
        {"server": server, "outcome": outcome, "requests": count} for (server, outcome), count in outcomes.items()
    ]
    found = {
        "seconds": seconds,
        "memory": memory,
        "latency": latency,
        "endings": sorted(endings, key=lambda row: (row["server"], row["outcome"])),
        "errors": dict(Counter(one.error for one in readings if one.error).most_common(20)),
        "golden": {"asked": golden.asked, "differences": golden.differences},
    }
    return found | {"verdicts": [verdict._asdict() for verdict in verdicts(found)]}


def parts(seconds: float, count: int, moments: Sequence[float], values: Sequence[float]) -> list[list[float]]:
    """The values of each of `count` equal parts of the time."""
    found: list[list[float]] = [[] for _ in range(count)]
    for moment, value in zip(moments, values, strict=True):
        found[min(int(moment / seconds * count), count - 1)].append(value)
    return found


def memory_row(server: str, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Medians in MiB by fifths; and of tenths, how far they lie apart in the last half, and its growth."""
    moments, rss = [one.at for one in samples], [one.rss for one in samples]
    fifths = parts(seconds, FIFTHS, moments, rss)
    anonymous = parts(seconds, FIFTHS, moments, [one.anonymous for one in samples])
    last = [statistics.median(part) for part in parts(seconds, 2 * FIFTHS, moments, rss)[FIFTHS:] if part]
    return {
        "server": server,
        "start": rss[0],
        "rss": [statistics.median(part) if part else None for part in fifths],
        "anonymous": [statistics.median(part) if part else None for part in anonymous],
        "peak": max(rss),
        "growth": (last[-1] - last[0]) / last[0] if last else None,
        "range": (max(last) - min(last)) / min(last) if last else None,
        "threads": [samples[0].threads, samples[-1].threads],
        "files": [samples[0].files, samples[-1].files],
    }


def latency_row(server: str, metric: str, readings: Sequence[Reading], seconds: float) -> dict[str, Any]:
    """p50 and p99 in milliseconds by fifths, and the last p99 as a multiple of the second with its 95 % interval."""
    known = [(one.sent, 1e3 * value) for one in readings if (value := getattr(one, metric)) is not None]
    fifths = parts(seconds, FIFTHS, [moment for moment, _ in known], [value for _, value in known])
    second, last = fifths[1], fifths[-1]
    enough = second and last
    return {
        "server": server,
        "metric": metric,
        "requests": len(known),
        "p50": [statistics.median(part) if part else None for part in fifths],
        "p99": [p99(part) if part else None for part in fifths],
        "ratio": p99(last) / p99(second) if enough else None,
        "interval": interval(second, last) if enough else None,
    }


def interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the ratio of two p99s, by drawing both again with replacement."""
    chance = random.Random(0)
    ratios = sorted(
        p99(chance.choices(after, k=len(after))) / p99(chance.choices(before, k=len(before))) for _ in range(RESAMPLED)
    )
    return ratios[int(0.025 * RESAMPLED)], ratios[int(0.975 * RESAMPLED) - 1]


def verdicts(found: dict[str, Any]) -> list[Verdict]:
    """Of each server's memory, of the latency of all requests, of errors and of the golden request."""
    wrong = {row["outcome"]: row["requests"] for row in found["endings"] if row["outcome"] not in MEANT}
    golden = found["golden"]
    return [
        *(_flat(row) for row in found["memory"]),
        *(_steady(row) for row in found["latency"] if row["server"] == "all"),
        Verdict("errors", not wrong, ", ".join(f"{count} {name}" for name, count in wrong.items()) or "none"),
        Verdict(
            "golden request",
            bool(golden["asked"]) and not golden["differences"],
            f"{len(golden['differences'])} of {golden['asked']} differ",
        ),
    ]


def _flat(row: dict[str, Any]) -> Verdict:
    name = f"RSS of {row['server']} flat within {FLAT:.0%} over the last half"
    if row["range"] is None:
        return Verdict(name, False, "no sample")
    return Verdict(name, row["range"] <= FLAT, f"{row['range']:.1%} apart, growth {row['growth']:+.1%}")


def _steady(row: dict[str, Any]) -> Verdict:
    name = f"p99 of {row['metric'].upper()} in the last fifth at most {1 + SLOWER:.1f}x of the second's"
    if row["ratio"] is None:
        return Verdict(name, False, "too few requests")
    low, high = row["interval"]
    return Verdict(name, row["ratio"] <= 1 + SLOWER, f"{row['ratio']:.2f}x ({low:.2f} to {high:.2f})")
