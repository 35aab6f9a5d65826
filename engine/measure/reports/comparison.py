"""Comparison of two profiles: the ratio of every common cell, and differing settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import units
from .blocks import Block, Cell, Chart, Gallery, Note, Section, Table, number
from .charts import Axis, Mark, marks
from .head import GROUPS, Json, fact, rows_of
from .latency import place, ratio, ratio_cell, tpot, ttft
from .series import Styles, parts_of
from .units import known

Key = tuple[str, int, int, int]
"""Strategy, prompt length, output length, batch size."""
Pair = tuple[Json, Json]
Measure = Callable[[Json], float | None]


def _peak(cell: Json) -> float | None:
    return known(cell.get("peak_memory_bytes"))


MEASURES: tuple[tuple[str, Measure, units.Format], ...] = (
    ("TTFT", ttft, units.milliseconds),
    ("TPOT", tpot, units.milliseconds),
    ("peak memory", _peak, units.size),
)


def pairs_of(before: Json, after: Json, styles: Styles) -> dict[Key, Pair]:
    """The cells that both profiles have, in the order of the page."""
    old, new = ({_key(cell): cell for cell in rows_of(results, "cells")} for results in (before, after))
    order = list(styles)
    keys = sorted(old.keys() & new.keys(), key=lambda key: (*key[1:], order.index(key[0])))
    return {key: (old[key], new[key]) for key in keys}


def _key(cell: Json) -> Key:
    length, batch = place(cell)
    return cell["strategy"], length, cell.get("output_len") or 0, batch


def differences(before: Json, after: Json) -> Section:
    """Differences between the runs other than the code; times are comparable only on the same machine."""
    rows = [
        [Cell(title), Cell(key.replace("_", " ")), Cell(fact(key, old.get(key))), Cell(fact(key, new.get(key)))]
        for group, title in GROUPS
        for old, new in [(before.get(group) or {}, after.get(group) or {})]
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    rows.insert(0, [Cell("Run"), Cell("started"), *(Cell(str(run.get("created") or "–")) for run in (before, after))])
    note = Note("Machine, model and settings that are not listed here are the same in both.")
    return Section("differences", "What differs", [note, Table(["", "", "before", "after"], rows)])


def ratios(before: Json, after: Json, styles: Styles) -> Section:
    pairs = pairs_of(before, after, styles)
    if not pairs:
        return Section("ratios", "Ratios", [Note("The two results have no cell in common.", warning=True)])
    columns = ["strategy", "prompt length", "batch", *(f"{name}, after / before" for name, _, _ in MEASURES)]
    table = Table(columns, [_row(key, pair, styles) for key, pair in pairs.items()], "Below 1× is better")
    return Section("ratios", "After against before", [*_left_out(before, after, pairs), *_gallery(pairs), table])


def _left_out(before: Json, after: Json, pairs: dict[Key, Pair]) -> list[Block]:
    counts = [len({_key(cell) for cell in rows_of(results, "cells")} - pairs.keys()) for results in (before, after)]
    disturbed = sum(any(cell.get("disturbed") for cell in pair) for pair in pairs.values())
    notes: list[Block] = []
    if any(counts):
        notes.append(Note(f"Left out are cells that only one profile has: before {counts[0]}, after {counts[1]}."))
    if disturbed:
        text = f"{disturbed} of {len(pairs)} cells were disturbed in one of the runs; they are marked in the table."
        notes.append(Note(text, warning=True))
    return notes


def _row(key: Key, pair: Pair, styles: Styles) -> list[Cell]:
    strategy, length, _, batch = key
    name = Cell(
        strategy,
        "disturbed" if any(cell.get("disturbed") for cell in pair) else "",
        style=styles.get(strategy),
    )
    cells = [name, number(length, units.tokens), number(batch, units.count)]
    return cells + [_ratio(pair, read, write) for _, read, write in MEASURES]


def _ratio(pair: Pair, read: Measure, write: units.Format) -> Cell:
    old, new = map(read, pair)
    cell = ratio_cell(ratio(new, old))
    return Cell(cell.text, f"{units.shown(old, write)} to {units.shown(new, write)}", cell.value, cell.tone)


def _gallery(pairs: dict[Key, Pair]) -> list[Block]:
    """A chart of all ratios for each prompt length, with a row for each strategy."""
    looks = parts_of(name for name, _, _ in MEASURES)
    charts = []
    ends = [value for pair in pairs.values() for _, value in _marks(pair, looks)]
    x = Axis(
        "after / before, log scale", "log", units.times_mark, min(ends, default=None), max(ends, default=None), 1.0
    )
    for length, batch in sorted({(key[1], key[3]) for key in pairs}):
        found = {key: pair for key, pair in pairs.items() if (key[1], key[3]) == (length, batch)}
        rows = [(key[0], _marks(pair, looks)) for key, pair in found.items()]
        what = f"{units.tokens(length)} tokens" + (f", {batch} prompts at once" if batch > 1 else "")
        if any(row for _, row in rows):
            charts.append(Chart(marks(rows, x, f"Ratios at {what}"), f"{what}: left of the line is better."))
    return [Gallery(charts, looks)] if charts else []


def _marks(pair: Pair, looks: Styles) -> Sequence[Mark]:
    out = []
    for name, read, _ in MEASURES:
        value = ratio(read(pair[1]), read(pair[0]))
        if value:
            out.append((looks[name], value))
    return out
