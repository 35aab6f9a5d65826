"""Tables and verdicts of a soak, for a terminal or as markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table


def show(record: dict[str, Any], console: Console, style: box.Box = box.HEAVY_HEAD) -> None:
    """Print the machine, the tables and the verdicts."""
    about = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    console.print(
        f"{about}; {record['seconds'] / 60:.1f} minutes: {record['command']}", highlight=False, soft_wrap=True
    )
    for table in (memory(record["memory"]), latency(record["latency"]), endings(record["endings"])):
        table.box = style
        console.print(table)
    for verdict in record["verdicts"]:
        mark = "met" if verdict["met"] else "MISSED"
        console.print(f"- {mark}: {verdict['name']}: {verdict['found']}", highlight=False, soft_wrap=True)
    for error, count in record["errors"].items():
        console.print(f"- error, {count} times: {error}", highlight=False, markup=False, soft_wrap=True)
    for difference in record["golden"]["differences"]:
        console.print(f"- golden request: {difference}", highlight=False, markup=False, soft_wrap=True)


def memory(rows: Iterable[dict[str, Any]]) -> Table:
    """RSS in MiB by fifths of the time."""
    table = Table("RSS, MiB", *_right("start", *_fifths(), "growth", "apart", "anonymous", "peak", "threads", "files"))
    for row in rows:
        cells = [_number(value, 0) for value in (row["start"], *row["rss"])]
        moved = [_share(row["growth"]), _share(row["range"])]
        counts = [f"{first} to {last}" for first, last in (row["threads"], row["files"])]
        table.add_row(row["server"], *cells, *moved, _number(row["anonymous"][-1], 0), _number(row["peak"], 0), *counts)
    return table


def latency(rows: Iterable[dict[str, Any]]) -> Table:
    """p99 and p50 in milliseconds by fifths of the time."""
    table = Table("ms", "", *_right("requests", *_fifths(), "last / second", "95 %"))
    for row in rows:
        for kind in ("p99", "p50"):
            cells = [_number(value, 1) for value in row[kind]]
            ratio = ["", ""] if kind == "p50" or row["ratio"] is None else [f"{row['ratio']:.2f}x", _interval(row)]
            table.add_row(row["server"], f"{row['metric'].upper()} {kind}", f"{row['requests']:,}", *cells, *ratio)
    return table


def endings(rows: Iterable[dict[str, Any]]) -> Table:
    table = Table("ended", "as", *_right("requests"))
    for row in rows:
        table.add_row(row["server"], row["outcome"], f"{row['requests']:,}")
    return table


def _fifths() -> list[str]:
    return ["first fifth", "second", "third", "fourth", "last"]


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _interval(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{low:.2f} to {high:.2f}"
