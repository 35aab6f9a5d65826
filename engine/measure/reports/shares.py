"""Report section on the parts of the time: linear layers, selection, attention and others."""

from __future__ import annotations

from collections.abc import Sequence

from . import units
from .blocks import Block, Cell, Chart, Folded, Gallery, Section, Table, named, number, text
from .charts import Axis, Stack, stacks
from .head import Json, rows_of
from .latency import PHASES, least_batch, place
from .series import Styles, parts_of
from .units import known

PARTS = ("linear", "selection", "attention", "index", "transfer", "sampling", "other")


def shares(results: Json, styles: Styles) -> Section:
    """A chart for each phase and length, with a bar for each strategy, at the smallest batch size."""
    cells = least_batch([cell for cell in rows_of(results, "cells") if cell.get("shares")])
    found = {part for cell in cells for phase in PHASES for part in _parts(cell, phase)}
    parts = parts_of([part for part in PARTS if part in found] + sorted(found - set(PARTS)))
    lengths = sorted({cell["input_len"] for cell in cells})
    charts = [
        chart
        for phase in PHASES
        for length in lengths
        for chart in _chart([cell for cell in cells if cell["input_len"] == length], phase, length, styles, parts)
    ]
    blocks: list[Block] = []
    if charts:
        table = Table(["strategy", "prompt length", "phase", *parts], _rows(cells, styles, parts))
        blocks = [Gallery(charts, parts, swatch=True), Folded("The same in numbers", table)]
    return Section("shares", "Where the time goes", blocks)


def _parts(cell: Json, phase: str) -> dict[str, float]:
    """Seconds of each part that was measured."""
    given = (cell["shares"] or {}).get(phase) or {}
    return {part: seconds for part, value in given.items() if (seconds := known(value)) is not None}


def _chart(cells: Sequence[Json], phase: str, length: int, styles: Styles, parts: Styles) -> list[Chart]:
    bars = [
        Stack(name, [(parts[part], spent[part]) for part in parts if part in spent])
        for name in styles
        for cell in cells
        if cell["strategy"] == name and (spent := _parts(cell, phase))
    ]
    if not bars:
        return []
    what = f"{phase.capitalize()}, {units.tokens(length)} tokens"
    longest = max(sum(seconds for _, seconds in bar.parts) for bar in bars)
    unit, write = ("s", units.short) if longest >= 1 else ("ms", lambda seconds: units.short(seconds * 1000))
    svg = stacks(bars, Axis(f"time of {phase} ({unit})", low=0.0, write=write), f"Parts of the time: {what}")
    return [Chart(svg, f"{what}; a part's share is written in it where there is room.")]


def _rows(cells: Sequence[Json], styles: Styles, parts: Styles) -> list[list[Cell]]:
    return [
        [
            named(cell["strategy"], styles),
            number(cell["input_len"], units.tokens),
            text(phase),
            *(_part(_parts(cell, phase), part) for part in parts),
        ]
        for cell in sorted(cells, key=lambda cell: (place(cell), list(styles).index(cell["strategy"])))
        for phase in PHASES
        if _parts(cell, phase)
    ]


def _part(spent: dict[str, float], part: str) -> Cell:
    total = sum(spent.values()) or 1.0
    return number(spent.get(part), units.seconds, below=units.percent(spent.get(part, 0.0) / total))
