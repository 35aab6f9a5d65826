"""Report sections on agreement with dense attention: divergence of distributions, coverage of heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from . import units
from .blocks import Block, Cell, Chart, Gallery, Note, Ramp, Section, Table, named, number, text
from .charts import Axis, Line, Span, heat, lines, spans
from .head import Json, rows_of
from .series import Style, Styles
from .units import known

PHASES = ("prefill", "decode")
KLS = ("kl_mean", "kl_median", "kl_p99")
SOURCES = {"text": "real text", "tasks": "the tasks"}
LEAST_KL = 1e-7
"""Least KL on a logarithmic axis; smaller ones are drawn there."""
COLUMNS = (
    "strategy",
    "read",
    "length",
    "phase",
    "positions",
    "KL, mean (nats)",
    "KL, median",
    "KL, p99",
    "same top token",
)
MEASURES = ("change of perplexity", "density", "coverage", "least coverage")
Map = Sequence[Sequence[float | None]]


def agreement(results: Json, strategies: Sequence[str], styles: Styles) -> Section:
    rows = rows_of(results, "agreement")
    title = "Agreement with dense attention"
    if not rows:
        return Section("agreement", title, [])
    others = {name: style for name, style in styles.items() if name != "dense"}
    charts = [*_ranges(rows, others), *_curves(rows, others)]
    table = Table([*COLUMNS, *MEASURES], [_row(row, styles) for row in _ordered(rows, strategies)])
    blocks: list[Block] = [Gallery(charts, others)] if charts else []
    return Section("agreement", title, [*blocks, table])


def _whole(rows: Sequence[Json]) -> list[Json]:
    """Rows over all names if there are any, otherwise those of each name; without rows that lack a KL."""
    rows = [row for row in rows if known(row.get("kl_mean")) is not None]
    return [row for row in rows if row.get("name") == "all"] or rows


def _ranges(rows: Sequence[Json], styles: Styles) -> list[Chart]:
    """Charts of the KL by source and phase: mean of each strategy, with a bar from median to 99th percentile."""
    charts = []
    drawn = [row for row in _whole(rows) if row["strategy"] in styles]
    ends = [_drawn(value) for row in drawn for key in KLS if (value := known(row.get(key))) is not None]
    low, high = min(ends, default=None), max(ends, default=None)
    x = Axis("KL divergence from dense (nats), log scale", "log", units.decades, low=low, high=high)
    for source, phase in product(SOURCES, PHASES):
        found = _whole([row for row in rows if (row.get("source"), row["phase"]) == (source, phase)])
        length = max((row["length"] for row in found), default=0)
        bars = [_span(row, styles) for row in found if row["length"] == length and row["strategy"] in styles]
        if bars:
            words = f"{phase.capitalize()} on {SOURCES[source]}, {units.tokens(length)} tokens"
            svg = spans(bars, x, f"KL divergence, {words}")
            charts.append(Chart(svg, f"{words}: the mean, and a bar from the median to the 99th percentile."))
    return charts


def _span(row: Json, styles: Styles) -> Span:
    low, high = known(row.get("kl_median")), known(row.get("kl_p99"))
    name = row["strategy"] if row.get("name", "all") == "all" else f"{row['strategy']} {row['name']}"
    style = styles[row["strategy"]]
    if low is None or high is None:
        return Span(name, style, _drawn(row["kl_mean"]))
    return Span(name, style, _drawn(row["kl_mean"]), _drawn(low), _drawn(high))


def _drawn(kl: float) -> float:
    return max(kl, LEAST_KL)


def _curves(rows: Sequence[Json], styles: Styles) -> list[Chart]:
    """Charts of the mean KL against length, for two lengths or more."""
    charts = []
    for phase in PHASES:
        found = [row for row in rows if row["phase"] == phase and row.get("source", "text") == "text"]
        found = sorted(_whole(found), key=lambda row: int(row["length"]))
        alone = len({row.get("name") for row in found}) == 1
        if alone and len({row["length"] for row in found}) > 1:
            series = [
                _curve([row for row in found if row["strategy"] == name], style) for name, style in styles.items()
            ]
            x = Axis("prompt length (tokens)", "lengths", units.tokens)
            y = Axis("mean KL (nats), log scale", "log", units.decades)
            svg = lines([line for line in series if line.xs], x, y, f"KL divergence against length, {phase}")
            charts.append(Chart(svg, f"{phase.capitalize()} on real text: the mean KL as the context grows."))
    return charts


def _curve(rows: Sequence[Json], style: Style) -> Line:
    return Line(style, [row["length"] for row in rows], [_drawn(row["kl_mean"]) for row in rows])


def _ordered(rows: Sequence[Json], strategies: Sequence[str]) -> list[Json]:
    """Rows by strategy, those over all names first, the longest first."""
    place = {name: number for number, name in enumerate(strategies)}
    return sorted(
        rows,
        key=lambda row: (
            place[row["strategy"]],
            row.get("source") != "text",
            row.get("name") != "all",
            str(row.get("name")),
            -row["length"],
            row["phase"] != "prefill",
        ),
    )


def _row(row: Json, styles: Styles) -> list[Cell]:
    error = known(row.get("perplexity_change_se"))
    below = "" if error is None else f"± {units.percent(error)}"
    change = known(row.get("perplexity_change"))
    name = row.get("name", "all")
    source = SOURCES.get(row.get("source", "text"), str(row.get("source")))
    return [
        named(row["strategy"], styles),
        text(source if name == "all" else f"{source}: {name}"),
        number(row["length"], units.tokens),
        text(row["phase"]),
        number(row.get("positions"), units.count),
        *(number(row.get(key), units.significant) for key in KLS),
        number(row.get("top1"), units.percent),
        number(change, units.signed_percent, below=below),
        *(number(row.get(key), units.percent) for key in ("density", "coverage", "coverage_min")),
    ]


def heads(results: Json, strategies: Sequence[str]) -> Section:
    """Maps of layers and heads: coverage and density."""
    rows = [row for row in rows_of(results, "heads") if row.get("coverage") or row.get("density")]
    rows = [row for name in strategies for row in rows if row["strategy"] == name and name != "dense"]
    if not rows:
        return Section("heads", "Coverage of each head", [])
    least = min((value for row in rows for value in _values(row.get("coverage"))), default=0.0)
    scale = (
        min(int(least * 20) / 20, 0.95),
        max((v for row in rows for v in _values(row.get("density"))), default=1.0),
    )
    longest = {(row["strategy"], row["phase"]): row for row in sorted(rows, key=lambda row: row.get("length") or 0)}
    shown = [row for row in rows if row is longest[row["strategy"], row["phase"]]]
    return Section("heads", "Coverage of each head", [Note(INTRODUCTION), _maps(shown, scale), _lowest(rows)])


INTRODUCTION = (
    "Coverage is the share of dense attention's weight that falls on the tokens a head was given; density is the share "
    "of the tokens. A dark cell in a coverage map is a head that no longer sees what it looked at. The maps are of the "
    "longest prompts."
)


def _values(cells: Map | None) -> list[float]:
    return [value for row in cells or [] for cell in row or [] if (value := known(cell)) is not None]


def _maps(rows: Sequence[Json], scale: tuple[float, float]) -> Gallery:
    low, high = scale
    charts = [
        chart for row in rows for chart in (_map(row, "coverage", low, 1.0), _map(row, "density", 0.0, high)) if chart
    ]
    ramps = [
        Ramp("coverage", units.percent(low), units.percent(1.0)),
        Ramp("density", units.percent(0.0), units.percent(high)),
    ]
    return Gallery(charts, ramps=ramps)


def _map(row: Json, key: str, low: float, high: float) -> Chart | None:
    values = _values(row.get(key))
    if not values:
        return None
    words = f"{row['strategy']}, {row['phase']}" + (
        f", {units.tokens(row['length'])} tokens" if row.get("length") else ""
    )
    cells = [[known(cell) for cell in layer or []] for layer in row[key]]
    mean = units.percent(sum(values) / len(values))
    ends = f"from {units.percent(min(values))} to {units.percent(max(values))}"
    return Chart(heat(cells, low, high, f"{key} of {words}"), f"{key.capitalize()}: {words}; mean {mean}, {ends}.")


def _lowest(rows: Sequence[Json], most: int = 12) -> Table:
    """Table of the heads with the least coverage."""
    found = [
        (value, layer, head, row)
        for row in rows
        for layer, cells in enumerate(row.get("coverage") or [])
        for head, cell in enumerate(cells or [])
        if (value := known(cell)) is not None
    ]
    found = sorted(found, key=lambda one: one[:3])[:most]
    columns = ["strategy", "phase", "length", "layer", "head", "coverage"]
    cells = [
        [
            text(row["strategy"]),
            text(row["phase"]),
            number(row.get("length"), units.tokens),
            *(number(place, units.count) for place in (layer, head)),
            number(value, units.percent),
        ]
        for value, layer, head, row in found
    ]
    return Table(columns, cells, "The heads with the least coverage (layers and heads count from 0)")
