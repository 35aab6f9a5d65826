"""Positions of axis marks, and line breaks of long names."""

from __future__ import annotations

import math
from collections.abc import Sequence

NAME_CHARS, NAME_LINES = 21, 3
"""Characters per line and lines of a strategy's name next to a chart."""


def marks_between(low: float, high: float) -> list[float]:
    """Three to eight marks of a log axis from `low` to `high`: decades, 1-3 or 1-2-5 in them, or even steps."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1,), (1, 3), (1, 2, 5)):
        marks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
        inside = [mark for mark in marks if low <= mark <= high]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / 8)]
    return even_steps(low, high)


def even_steps(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 in some decade: the fewest that are at least three."""
    decade = 10.0 ** math.ceil(math.log10(high - low))
    for step in (decade * factor for factor in (1, 0.5, 0.2, 0.1, 0.05, 0.02)):
        marks = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(marks) >= 3:
            break
    return marks


def apart(values: Sequence[float], most: float = 11.0) -> list[float]:
    """Values whose marks do not overlap on a log axis: at most one in an eleventh of its length."""
    if not values:
        return []
    least = (values[-1] / values[0]) ** (1 / most)
    kept = [values[-1]]
    for value in reversed(values):
        if value * least <= kept[-1] and value < kept[-1]:
            kept.append(value)
    return kept[::-1]


def wrapped(name: str) -> str:
    """A name in at most three lines, preferably broken after a sign."""
    out = [""]
    for part in pieces(name):
        if out[-1] and len(out[-1]) + len(part) > NAME_CHARS:
            out.append("")
        out[-1] += part
    out = [line.strip() for line in out]
    return "\n".join(out if len(out) <= NAME_LINES else [*out[: NAME_LINES - 1], out[NAME_LINES - 1][:-1] + "…"])


def pieces(name: str) -> list[str]:
    """`a+b c=1` -> `a+`, `b `, `c=1`; longer parts are cut to a line."""
    parts, start = [], 0
    for place, sign in enumerate(name, 1):
        if sign in "+ ,(" or place - start >= NAME_CHARS:
            parts.append(name[start:place])
            start = place
    return [*parts, name[start:]] if start < len(name) else parts
