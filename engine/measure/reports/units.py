"""Formats of numbers with their units; `–` for None."""

from __future__ import annotations

import math
from collections.abc import Callable

NOTHING = "–"
Format = Callable[[float], str]


def known(value: object) -> float | None:
    """`value` if it is a finite number, otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def shown(value: object, write: Format) -> str:
    """`value` formatted by `write`; `–` for None."""
    number = known(value)
    return NOTHING if number is None else write(number)


def significant(value: float, digits: int = 3) -> str:
    """`1,234` `12.3` `0.00123` `1.2e-06`."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        return minus(f"{value:.{digits - 1}e}")
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return minus(f"{value:,.{decimals}f}")


def short(value: float) -> str:
    """As `significant`, without trailing zeros, for axis marks."""
    text = significant(value)
    return _power(text) if "e" in text else short_zeros(text)


def decades(value: float) -> str:
    """As `short`, but `1e−3` below a hundredth: for an axis of many decades."""
    return _power(f"{value:.1e}") if 0 < value < 0.01 else short(value)


def _power(text: str) -> str:
    mantissa, exponent = text.split("e")
    return f"{short_zeros(mantissa)}e{minus(str(int(exponent.replace('−', '-'))))}"


def short_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def minus(text: str) -> str:
    return text.replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    return ("+" if value > 0 else "") + significant(value, digits)


def percent(share: float) -> str:
    """A share of 1: `93.8 %`, with more digits for small shares."""
    hundred = share * 100
    return f"{minus(short_zeros(f'{hundred:.1f}')) if abs(hundred) >= 1 else short(float(f'{hundred:.2g}'))} %"


def signed_percent(share: float) -> str:
    return ("+" if share > 0 else "") + percent(share)


def points(share: float) -> str:
    """A difference of shares, in percentage points: `+1.5`."""
    rounded = round(share * 100, 1)
    return ("+" if rounded > 0 else "") + minus(short_zeros(f"{rounded:.1f}")) if rounded else "0"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 100 else f"{ratio:,.0f}×"


def count(value: float) -> str:
    return minus(f"{value:,.0f}") if value == int(value) else significant(value)


def tokens(value: float) -> str:
    """A length of tokens: `4k` is 4,096."""
    whole = int(value)
    return f"{whole // 1024}k" if whole and whole % 1024 == 0 else f"{whole:,}"


def milliseconds(value: float) -> str:
    """A time given in ms, as `12.3 ms` or `4.56 s`."""
    return seconds(value / 1000)


def seconds(value: float) -> str:
    """A time given in s: `85 µs`, `12.3 ms`, `4.56 s`, `12 min 5 s`, `2 h 10 min`."""
    if abs(value) < 1e-3:
        return f"{significant(value * 1e6)} µs" if value else "0 s"
    if abs(value) < 1:
        return f"{significant(value * 1e3)} ms"
    if abs(value) < 120:
        return f"{significant(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


def time_mark(value: float) -> str:
    """As `seconds`, without trailing zeros."""
    number, _, unit = seconds(value).partition(" ")
    return f"{short_zeros(number)} {unit}"


def times_mark(ratio: float) -> str:
    return f"{short(ratio)}×"


def size(value: float) -> str:
    """Bytes as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{short(value)} {unit}"
        value /= 1024
    return f"{short(value)} TiB"
