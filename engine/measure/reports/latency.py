"""Report sections on latency: a table of all cells, and charts over prompt lengths."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from . import units
from .blocks import Block, Cell, Chart, Gallery, Note, Section, Table, number, text
from .charts import Axis, Line, lines
from .head import Json, rows_of
from .series import Styles
from .units import known

LENGTH = Axis("prompt length (tokens)", "lengths", units.tokens)
PHASES = ("prefill", "decode")
COLUMNS = (
    "strategy",
    "prompt length",
    "batch",
    "TTFT",
    "TTFT against dense",
    "TPOT",
    "TPOT against dense",
    "decode step",
    "ITL, p99",
)
MEASURES = ("output (tokens/s)", "peak memory", "KV cache", "prefill density", "decode density", "coverage")
MOVES = ("KV read", "KV moved", "CPU share", "runs")
EVEN = 0.03
"""Ratios this near to 1 are neither good nor bad."""
Place = tuple[int, int]
"""Prompt length, batch size."""
Reading = Callable[[Json], tuple[float | None, float | None, float | None]]
"""A value of a cell with its bounds."""


def place(cell: Json) -> Place:
    return cell["input_len"], cell.get("batch_size") or 1


def of_dense(cells: Sequence[Json]) -> dict[Place, Json]:
    return {place(cell): cell for cell in cells if cell["strategy"] == "dense"}


def ttft(cell: Json) -> float | None:
    """Time to the first token, ms."""
    return _of_runs(cell, "ttft")


def tpot(cell: Json) -> float | None:
    """Time per output token, ms."""
    given = _of_runs(cell, "tpot")
    return step_time(cell) if given is None else given


def _of_runs(cell: Json, metric: str) -> float | None:
    """The median of the runs, each the median of its requests; without them that of all requests, ms."""
    given = known((cell.get(f"{metric}_ms") or {}).get("median"))
    return known(cell.get(f"median_{metric}_ms")) if given is None else given


def step_time(cell: Json) -> float | None:
    """The median time of a decode step, ms."""
    latency = known(cell.get("decode_latency"))
    return None if latency is None else latency * 1000


def ratio(mine: float | None, theirs: float | None) -> float | None:
    return mine / theirs if mine is not None and theirs else None


def ratio_cell(value: float | None) -> Cell:
    """A ratio of times or bytes: below 1 is good."""
    tone = "" if value is None or abs(value - 1) < EVEN else "bad" if value > 1 else "good"
    return number(value, units.times, tone=tone)


def cells_table(results: Json, styles: Styles) -> Section:
    cells = sorted(rows_of(results, "cells"), key=lambda cell: (*place(cell), list(styles).index(cell["strategy"])))
    if not cells:
        return Section("cells", "Latency", [])
    dense = of_dense(cells)
    columns = [*COLUMNS, *MEASURES, *MOVES]
    table = Table(columns, [_row(cell, dense.get(place(cell), {}), styles) for cell in cells], "Medians of the runs")
    disturbed = [cell for cell in cells if cell.get("disturbed")]
    return Section("cells", "Latency of every cell", [*_disturbed(disturbed, len(cells)), table])


def _disturbed(cells: Sequence[Json], of: int) -> list[Block]:
    if not cells:
        return []
    names = "; ".join(_called(cell) for cell in cells[:6])
    rest = f" and {len(cells) - 6} more" if len(cells) > 6 else ""
    note = f"Something else was running during {len(cells)} of {of} cells ({names}{rest}): read their times with care."
    return [Note(note, warning=True)]


def _called(cell: Json) -> str:
    length, batch = place(cell)
    return f"{cell['strategy']} at {units.tokens(length)}" + (f", batch {batch}" if batch > 1 else "")


def _row(cell: Json, dense: Json, styles: Styles) -> list[Cell]:
    spread = cell.get("ttft_ms") or {}
    low, high = known(spread.get("min")), known(spread.get("max"))
    reach = "" if low is None or high is None else f"{units.milliseconds(low)} to {units.milliseconds(high)}"
    itself = cell["strategy"] == "dense"
    return [
        Cell(cell["strategy"], "disturbed" if cell.get("disturbed") else "", style=styles[cell["strategy"]]),
        number(cell["input_len"], units.tokens),
        number(cell.get("batch_size") or 1, units.count),
        number(ttft(cell), units.milliseconds, below=reach),
        text(None) if itself else ratio_cell(ratio(ttft(cell), ttft(dense))),
        number(tpot(cell), units.milliseconds),
        text(None) if itself else ratio_cell(ratio(tpot(cell), tpot(dense))),
        number(step_time(cell), units.milliseconds),
        number(cell.get("p99_itl_ms"), units.milliseconds),
        number(cell.get("output_throughput"), units.significant),
        *(number(cell.get(key), units.size) for key in ("peak_memory_bytes", "kv_bytes")),
        *(number(cell.get(key), units.percent) for key in ("prefill_density", "decode_density", "coverage")),
        *(number(cell.get(key), units.size) for key in ("kv_bytes_read", "kv_bytes_moved")),
        number(cell.get("cpu_share"), units.percent),
        number(cell.get("runs"), units.count),
    ]


def latency(results: Json, styles: Styles) -> Section:
    """Time to the first token and time per token against length, a pair of charts for each batch size."""
    cells = rows_of(results, "cells")
    charts = [
        chart
        for batch in sorted({place(cell)[1] for cell in cells})
        for chart in _pair([cell for cell in cells if place(cell)[1] == batch], batch, styles)
    ]
    charts += [*_densities(cells, styles), *_timeline(cells, styles), *_memory(cells, styles), *_batches(cells, styles)]
    return Section("latency", "Latency against length", [Gallery(charts, styles)] if charts else [])


def _pair(cells: Sequence[Json], batch: int, styles: Styles) -> list[Chart]:
    hollow = " A hollow mark is a disturbed measurement." if any(cell.get("disturbed") for cell in cells) else ""
    many = f", {batch} prompts at once" if batch > 1 else ""
    first, later = _series(cells, styles, _first), _series(cells, styles, _later)
    charts = []
    if first:
        y = Axis("TTFT, log scale", "log", units.time_mark)
        svg = lines(first, LENGTH, y, f"Time to the first token against length{many}", spread="bars")
        charts.append(
            Chart(svg, f"Time to the first token{many}: the median, from the fastest to the slowest run.{hollow}")
        )
    if later:
        y = Axis("TPOT (ms per token)", low=0.0)
        svg = lines(later, LENGTH, y, f"Time per output token against length{many}")
        charts.append(Chart(svg, f"Time per output token{many}: the median.{hollow}"))
    return charts


def _first(cell: Json) -> tuple[float | None, float | None, float | None]:
    spread = cell.get("ttft_ms") or {}
    return _s(ttft(cell)), _s(known(spread.get("min"))), _s(known(spread.get("max")))


def _later(cell: Json) -> tuple[float | None, float | None, float | None]:
    return tpot(cell), None, None


def _s(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def _series(cells: Sequence[Json], styles: Styles, read: Reading) -> list[Line]:
    """A line over the lengths for each strategy with values."""
    out = []
    for name, style in styles.items():
        mine = sorted((cell for cell in cells if cell["strategy"] == name), key=place)
        found = [cell for cell in mine if (read(cell)[0] or 0) > 0]
        if found:
            bounds = [read(cell) for cell in found]
            hollow = [bool(cell.get("disturbed")) for cell in found]
            ys, lows, highs = (
                [y or 0.0 for y, _, _ in bounds],
                [low for _, low, _ in bounds],
                [top for _, _, top in bounds],
            )
            out.append(Line(style, [cell["input_len"] for cell in found], ys, lows, highs, hollow))
    return out


def least_batch(cells: Sequence[Json]) -> list[Json]:
    least = min((place(cell)[1] for cell in cells), default=1)
    return [cell for cell in cells if place(cell)[1] == least]


def _densities(cells: Sequence[Json], styles: Styles) -> list[Chart]:
    charts = []
    for phase in PHASES:
        series = _series(least_batch(cells), styles, _only(f"{phase}_density"))
        if series:
            y = Axis(f"{phase} density (%), log scale", "log", units.percent, low=0.1)
            svg = lines(series, LENGTH, y, f"{phase.capitalize()} density against length")
            charts.append(Chart(svg, f"The share of the attention that was computed, {phase}."))
    return charts


def _only(key: str) -> Reading:
    """A value without bounds."""
    return lambda cell: (known(cell.get(key)), None, None)


def _memory(cells: Sequence[Json], styles: Styles) -> list[Chart]:
    most = max((place(cell)[1] for cell in cells), default=1)
    wide = [cell for cell in cells if place(cell)[1] == most]
    series = _series(wide, styles, lambda cell: (_gib(cell.get("peak_memory_bytes")), None, None))
    y = Axis("peak memory (GiB)", low=0.0)
    many = f", {most} prompts at once" if most > 1 else ""
    label = f"Peak memory against length{many}"
    return [Chart(lines(series, LENGTH, y, label), f"Peak memory of the process{many}.")] if series else []


def _gib(value: object) -> float | None:
    size = known(value)
    return None if size is None else size / 2**30


def _batches(cells: Sequence[Json], styles: Styles) -> list[Chart]:
    """Chart of throughput against batch size at the longest prompts, for two sizes or more."""
    length = max((cell["input_len"] for cell in cells), default=0)
    cells = [{**cell, "input_len": place(cell)[1]} for cell in cells if cell["input_len"] == length]
    series = _series(cells, styles, _only("output_throughput"))
    if len({cell["input_len"] for cell in cells}) < 2 or not series:
        return []
    x = Axis("prompts at once", "lengths", units.count)
    svg = lines(series, x, Axis("output (tokens/s)", low=0.0), "Throughput against batch size")
    return [Chart(svg, f"New tokens each second, prompts of {units.tokens(length)} tokens, their prefill included.")]


def _timeline(cells: Sequence[Json], styles: Styles) -> list[Chart]:
    """Chart of the wait for each token after the longest prompts: median, least and most over sequences."""
    length = max((cell["input_len"] for cell in cells if cell.get("itls")), default=0)
    found = [cell for cell in least_batch(cells) if cell["input_len"] == length]
    series = [_waits(cell, styles) for cell in found if any(cell.get("itls") or [])]
    x, y = Axis("new token", write=units.count), Axis("ITL (ms), log scale", "log", units.short)
    if not series:
        return []
    svg = lines(series, x, y, "Inter-token latency of each token", spread="band", markers=False)
    return [Chart(svg, f"The wait before each new token after a prompt of {units.tokens(length)} tokens.")]


def _waits(cell: Json, styles: Styles) -> Line:
    runs = [[1000 * wait for wait in run] for run in cell["itls"] if run]
    columns = [[run[token] for run in runs if token < len(run)] for token in range(max(map(len, runs)))]
    middle = [max(statistics.median(column), 1e-3) for column in columns]
    bounds = [[max(pick(column), 1e-3) for column in columns] for pick in (min, max)] if len(runs) > 1 else [[], []]
    return Line(styles[cell["strategy"]], range(2, len(columns) + 2), middle, *bounds)
