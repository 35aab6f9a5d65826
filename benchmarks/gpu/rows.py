"""Shared parts of the GPU tables: sizes, rows that may fail, aims and their display."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from keysift.kvcache.ops import BackendUnavailable, use_backend

from .clock import Clock

Row = dict[str, Any]
SHAPE, SMALL = (32, 8, 128), (8, 2, 64)
"""Query heads, key/value heads, head dim: of the usual model of 8 billion weights, and for a try on a CPU."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes, strategies' budgets and clock of a run."""

    clock: Clock
    shape: tuple[int, int, int]
    lengths: Sequence[int]
    """Tokens of prompts."""
    contexts: Sequence[int]
    """Context lengths of decoded tokens, each including itself."""
    long: int
    """Context length of the offloaded request and of the whole model."""
    chunk: int
    """Prompt tokens of a step."""
    batches: Sequence[int]
    budgets: Sequence[int]
    """Tokens that a sparse strategy reads in addition to its zones."""
    steps: int
    """New tokens of a request that are timed."""
    seed: int

    @property
    def device(self) -> torch.device:
        return self.clock.device

    @property
    def small(self) -> bool:
        """Tiny sizes, to test the script."""
        return self.clock.brief

    @classmethod
    def full(cls, clock: Clock, seed: int) -> Settings:
        lengths = [1 << n for n in range(13, 19)]
        contexts = [1 << n for n in range(15, 21)]
        return cls(clock, SHAPE, lengths, contexts, 1 << 17, 8192, (1, 16), (2048, 4096), 64, seed)

    @classmethod
    def tiny(cls, clock: Clock, seed: int) -> Settings:
        return cls(clock, SMALL, [512], [1024], 2048, 256, (1, 2), (128, 256), 3, seed)


@dataclass(frozen=True, slots=True)
class Aim:
    """A target for a value of a table."""

    text: str
    value: float | None
    """None: not measured."""
    bound: float
    at_least: bool = True

    def verdict(self, on_gpu: bool) -> str:
        if self.value is None or not on_gpu:
            return "not measured"
        return "met" if (self.value >= self.bound if self.at_least else self.value <= self.bound) else "missed"

    def row(self, on_gpu: bool) -> Row:
        return {
            "aim": self.text,
            "value": self.value if on_gpu else None,
            "bound": f"at {'least' if self.at_least else 'most'} {self.bound:g}",
            "verdict": self.verdict(on_gpu),
        }


def attempt(fixed: Row, work: Callable[[], Row]) -> Row:
    """The row that `work` measures, or one with its error."""
    return next(guarded(fixed, ({**fixed, **each()} for each in (work,))))


def guarded(fixed: Row, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows up to the first exception, then one with that error."""
    try:
        yield from rows
        return
    except Exception as error:  # such as out of memory or a missing kernel
        message = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"
    free()
    yield {**fixed, "error": message.splitlines()[0][:300]}


def free() -> None:
    """Release unused memory of the device."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def fallback(work: Callable[[], object], device: torch.device) -> str | None:
    """Ops of this work that ran by the torch reference for lack of a kernel; None: none."""
    try:
        with use_backend("triton" if device.type == "cuda" else "native"):
            work()
    except BackendUnavailable as error:
        return str(error)
    return None


def best(rows: Iterable[Row], key: str, **match: Any) -> Row | None:
    """The measured row with the least `key` among those that match."""
    fitting = [row for row in rows if key in row and all(row.get(name) == value for name, value in match.items())]
    return min(fitting, key=lambda row: row[key]) if fitting else None


def ratio(above: Row | None, below: Row | None, key: str, other: str | None = None) -> float | None:
    """Ratio of two rows' values under `key`, the lower one under `other` if given; None if one is missing."""
    if above is None or below is None or above.get(key) is None:
        return None
    return float(above[key] / below[other or key])


def show(name: str, rows: Sequence[Row], aims: Sequence[Row], console: Console) -> None:
    """A table of rows and, under it, its aims."""
    widest = sorted(rows, key=len, reverse=True)
    columns = list(dict.fromkeys(key for row in widest for key in row if row[key] is not None))
    columns = [key for key in columns if key not in ("error", "skipped")]
    table = Table(*columns, "remark", title=name)
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns), row.get("error") or row.get("skipped") or "")
    console.print(table, highlight=False)
    for aim in aims:
        console.print(f"{aim['verdict']}: {aim['aim']} ({_cell(aim['value'])}; {aim['bound']})", highlight=False)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return str(value)
