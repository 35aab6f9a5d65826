"""Readings of quality: options on the command line, storage in a file, tables and curves."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from .texts import KINDS
from .timing import machine

Row = dict[str, Any]
"""A point of a curve: its text, length, curve, options and strategy; its results once it is measured."""
LONGEST = 8000
"""The embedded model's 8,192 tokens less a question."""


def parse(parser: argparse.ArgumentParser, curves: Iterable[str], file: str) -> argparse.Namespace:
    """Parse and check the options of every quality benchmark."""
    parser.add_argument("--texts", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8000], help="tokens, multiples of 64")
    parser.add_argument("--curves", nargs="+", default=list(curves), choices=list(curves), metavar="CURVE")
    parser.add_argument("--file", type=Path, default=Path(file), help="file of the readings")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (.svg, .png); needs matplotlib")
    options = parser.parse_args()
    if wrong := [length for length in options.lengths if length % 64 or not 2048 <= length <= LONGEST]:
        parser.error(f"--lengths: multiples of 64 from 2048 to {LONGEST}, got {wrong[0]}")
    if options.plot:
        import matplotlib  # noqa: F401
    return options


def collect(
    plan: list[Row], file: Path, names: Sequence[str], measure: Callable[[Row], dict[str, Any]]
) -> Iterator[Row]:
    """The planned rows, taken from the file if it has one that agrees in `names`; others are measured and added.

    Changed code does not show in a row: begin a new file.
    """
    known = {_key(row, names): row for row in _kept(file)}
    with _progress() as bar, file.open("a") as out:
        task = bar.add_task("", total=len(plan))
        for row in plan:
            bar.update(task, description=f"{row['text']} {row['length']} {row['curve']} {row['options']}")
            if (found := known.get(_key(row, names))) is None:
                found = {**row, **measure(row), "date": machine()["date"]}
                out.write(json.dumps(found) + "\n")
                out.flush()
            bar.advance(task)
            yield {**found, **row}


def _key(row: Row, names: Sequence[str]) -> str:
    return json.dumps([row[name] for name in names])


def _kept(file: Path) -> Iterator[Row]:
    """Rows in the file; an incomplete last line is skipped."""
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip


def show(rows: list[Row], columns: Sequence[str], curves: Sequence[str], reference: str, path: Path | None) -> None:
    """The machine, the means over the texts, every curve against the reference, and the plot if one is wanted."""
    console = Console(width=210)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), highlight=False)
    console.print(curves_table(rows, columns), matched_table(rows, curves, reference))
    if path:
        plot(rows, curves, path)


def curves_table(rows: Iterable[Row], columns: Sequence[str]) -> Table:
    """Means over the texts, and the greatest KL of a text; - for unknown values."""
    groups: dict[tuple[int, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["length"], row["curve"], spelt(row["options"])].append(row)
    options = Column("options", no_wrap=True)
    table = Table("tokens", "strategy", options, *columns, "worst kl", title="Means over the texts")
    for (length, curve, knobs), group in groups.items():
        means = [
            "-" if group[0][name] is None else f"{statistics.fmean(row[name] for row in group):.4f}" for name in columns
        ]
        table.add_row(str(length), curve, knobs, *means, f"{max(row['kl'] for row in group):.4f}")
    return table


def spelt(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def matched_table(rows: list[Row], curves: Sequence[str], reference: str) -> Table:
    """KL of the curves at the densities that the reference reached, on log-linear lines through their points."""
    others = [curve for curve in curves if curve != reference and any(row["curve"] == curve for row in rows)]
    title = f"KL at the density of {reference}, and as a multiple of its own; - where a curve has no point near"
    table = Table("tokens", "text", "density", reference, *others, title=title)
    for row in (row for row in rows if row["curve"] == reference):
        near = [other for other in rows if (other["text"], other["length"]) == (row["text"], row["length"])]
        cells = [at_density([other for other in near if other["curve"] == curve], row["density"]) for curve in others]
        shown = ("-" if cell is None else f"{cell:.4f} ({cell / row['kl']:.2f}x)" for cell in cells)
        table.add_row(str(row["length"]), row["text"], f"{row['density']:.3f}", f"{row['kl']:.4f}", *shown)
    return table


def at_density(curve: list[Row], density: float) -> float | None:
    """KL between the points of a curve; up to 0.02 beyond its ends counts as the end."""
    line = sorted((row["density"], row["kl"]) for row in curve)
    if not line or not line[0][0] - 0.02 <= density <= line[-1][0] + 0.02:
        return None
    return float(np.exp(np.interp(density, [x for x, _ in line], np.log([y for _, y in line]))))


def plot(rows: list[Row], curves: Sequence[str], path: Path) -> None:
    """KL against density, one panel for each text and length."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["length"], row["text"]) for row in rows))
    columns = len({text for _, text in panels})
    figure = Figure(figsize=(4 * columns, 3.6 * -(-len(panels) // columns)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(-(-len(panels) // columns), columns, sharey=True)).flatten()
    for axis, (length, text) in zip(axes, panels, strict=False):
        for curve in curves:
            line = [row for row in rows if (row["length"], row["text"], row["curve"]) == (length, text, curve)]
            line.sort(key=lambda row: row["density"])
            axis.plot([row["density"] for row in line], [row["kl"] for row in line], "o-", ms=3, lw=1, label=curve)
        axis.set(title=f"{text}, {length} tokens", xlabel="density", ylabel="KL to dense, nats", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=6)
    figure.savefig(path)
