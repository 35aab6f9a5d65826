"""Report section on a server under load: completed requests and waiting times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from . import units
from .blocks import Block, Cell, Chart, Gallery, Note, Section, Table, named, number
from .charts import Axis, steps
from .head import Json
from .series import Styles
from .units import known

COUNTS = (
    ("completed", "completed", units.count),
    ("failed", "failed", units.count),
    ("duration", "duration", units.seconds),
    ("request_rate", "offered (requests/s)", units.significant),
    ("request_throughput", "served (requests/s)", units.significant),
    ("request_goodput", "goodput (requests/s)", units.significant),
    ("output_throughput", "output (tokens/s)", units.significant),
    ("total_token_throughput", "all tokens (tokens/s)", units.significant),
    ("max_concurrent_requests", "most at once", units.count),
)
TIMES = ("ttft", "tpot", "itl", "e2el")
SCALES = {"mean": "mean", "median": "median", "std": "standard deviation", "p99": "p99"}


def loads_of(results: Json) -> list[Json]:
    """The load runs in the results: none, one or several."""
    runs = results.get("load") or []
    return [runs] if isinstance(runs, dict) else list(runs)


def load(results: Json, styles: Styles) -> Section:
    runs = loads_of(results)
    if not runs:
        return Section("load", "Under load", [])
    columns = ["strategy", *(title for _, title, _ in COUNTS)]
    counts = [[_name(run, styles), *(number(run.get(key), write) for key, _, write in COUNTS)] for run in runs]
    titles = ["strategy", "time", *SCALES.values()]
    waits = [_wait(run, time, styles) for run in runs for time in TIMES]
    charts = [*_chart(runs, styles, "TTFT", "the first token", _ttfts), *_chart(runs, styles, "ITL", "a token", _itls)]
    blocks: list[Block] = [Table(columns, counts, "Requests"), Table(titles, waits, "Latency")]
    return Section("load", "Under load", [*_errors(runs), *blocks, *([Gallery(charts, styles)] if charts else [])])


def strategy_of(run: Json) -> str:
    return str(run.get("strategy") or "server")


def _name(run: Json, styles: Styles) -> Cell:
    return named(strategy_of(run), styles)


def _wait(run: Json, time: str, styles: Styles) -> list[Cell]:
    spread = (number(run.get(f"{scale}_{time}_ms"), units.milliseconds) for scale in SCALES)
    return [_name(run, styles), Cell(time.upper()), *spread]


def _ttfts(run: Json) -> list[float]:
    return [wait for value in run.get("ttfts") or [] if (wait := known(value)) is not None and wait > 0]


def _itls(run: Json) -> list[float]:
    waits = [wait for row in run.get("itls") or [] for wait in (row if isinstance(row, list) else [row])]
    return [wait for value in waits if (wait := known(value)) is not None and wait > 0]


def _chart(
    runs: Sequence[Json], styles: Styles, name: str, what: str, read: Callable[[Json], list[float]]
) -> list[Chart]:
    series = [(styles[strategy_of(run)], waits) for run in runs if (waits := read(run))]
    if not series:
        return []
    svg = steps(series, Axis(f"{name}, log scale", "log", units.time_mark), f"Distribution of {name}")
    return [Chart(svg, f"The share of waits for {what} that were no longer than this; dotted: the half, and 99 %.")]


def _errors(runs: Sequence[Json]) -> list[Block]:
    """Errors with their counts; `errors` may contain empty texts for requests without one."""
    counts = Counter(str(error) for run in runs for error in run.get("errors") or [] if error)
    if not counts:
        return []
    listed = "; ".join(f"{error} ({number} times)" if number > 1 else error for error, number in counts.most_common(5))
    rest = f"; and {len(counts) - 5} other errors" if len(counts) > 5 else ""
    return [Note(f"Requests failed: {listed}{rest}", warning=True)]
