"""Kinds of charts, each a function from numbers to inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import units
from .axes import apart, marks_between, wrapped
from .canvas import draw
from .series import GROUND, INK, MARKS, MUTED, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as Side

Scale = Literal["linear", "log", "lengths"]
"""`lengths`: log2 with a mark at each length that was run."""
Number = float | None


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: label with unit, scale and range."""

    label: str
    scale: Scale = "linear"
    write: units.Format = units.short
    low: Number = None
    high: Number = None
    """Ends of a linear axis, by default the data's; values that a log axis always contains."""
    rule: Number = None
    """A value with a line through the chart."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series: points [n] in order, their bounds [n] if known; doubtful points are hollow."""

    style: Style
    xs: Sequence[float]
    ys: Sequence[float]
    lows: Sequence[Number] = ()
    highs: Sequence[Number] = ()
    hollow: Sequence[bool] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """One row of a chart of rows: a name, a point, and a bar from `low` to `high` through it."""

    name: str
    style: Style
    value: float
    low: Number = None
    high: Number = None


@dataclass(frozen=True, slots=True)
class Stack:
    """One stacked bar: a name and its parts, in order."""

    name: str
    parts: Sequence[tuple[Style, float]]


Spread = Literal["band", "bars", "none"]
Mark = tuple[Style, float]


def lines(
    series: Sequence[Line], x: Axis, y: Axis, label: str, *, spread: Spread = "none", markers: bool = True
) -> str:
    """Lines through points, with a band or error bars for known bounds."""

    def paint(axes: Axes) -> None:
        for line in series:
            _line(axes, line, markers)
            if spread != "none":
                _spread(axes, line, spread)
        _side(axes, axes.xaxis, x, [value for line in series for value in line.xs])
        reach = [value for line in series for value in (*line.ys, *line.lows, *line.highs) if value is not None]
        _side(axes, axes.yaxis, y, reach)

    return draw(paint, label)


def _line(axes: Axes, line: Line, markers: bool) -> None:
    axes.plot(line.xs, line.ys, color=line.style.colour, linestyle=_dashed(line.style))
    if not markers:
        return
    for value, height, doubtful in zip(line.xs, line.ys, line.hollow or [False] * len(line.xs), strict=True):
        face = MARKS[GROUND] if doubtful else line.style.colour
        axes.plot([value], [height], color=line.style.colour, marker=line.style.marker, markerfacecolor=face)


def _dashed(style: Style) -> Any:
    return (0, style.dashes) if style.dashes else "-"


def _spread(axes: Axes, line: Line, spread: Spread) -> None:
    bounds = zip(line.xs, line.ys, line.lows, line.highs, strict=False)
    known = [(x, y, low, high) for x, y, low, high in bounds if low is not None and high is not None]
    if not known:
        return
    xs, ys, lows, highs = zip(*known, strict=True)
    if spread == "band" and len(xs) > 1:
        axes.fill_between(xs, lows, highs, color=line.style.colour, alpha=0.13, linewidth=0)
    else:
        below = [max(y - low, 0.0) for y, low in zip(ys, lows, strict=True)]
        above = [max(high - y, 0.0) for y, high in zip(ys, highs, strict=True)]
        axes.errorbar(xs, ys, [below, above], fmt="none", color=line.style.colour, elinewidth=1, capsize=3)


def spans(rows: Sequence[Span], x: Axis, label: str) -> str:
    """A point with its range in each row, the first row on top."""

    def paint(axes: Axes) -> None:
        for place, row in enumerate(rows):
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color=row.style.colour, alpha=0.55, linewidth=2.5)
            axes.plot([row.value], [place], color=row.style.colour, marker=row.style.marker, markersize=7)
        reach = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
        _side(axes, axes.xaxis, x, reach)
        _names(axes, [row.name for row in rows])

    return draw(paint, label, _tall([row.name for row in rows]))


def marks(rows: Sequence[tuple[str, Sequence[Mark]]], x: Axis, label: str) -> str:
    """Several marks in each named row, the first row on top, with a vertical offset between marks."""

    def paint(axes: Axes) -> None:
        for place, (_, found) in enumerate(rows):
            for turn, (style, value) in enumerate(found):
                height = place + 0.22 * (turn - (len(found) - 1) / 2)
                axes.plot([value], [height], color=style.colour, marker=style.marker, linestyle="none")
        _side(axes, axes.xaxis, x, [value for _, found in rows for _, value in found] + [x.rule or 1.0])
        _names(axes, [name for name, _ in rows])

    return draw(paint, label, _tall([name for name, _ in rows]))


def stacks(bars: Sequence[Stack], x: Axis, label: str) -> str:
    """Horizontal stacked bars, with the share written into each part that is wide enough."""
    longest = max((sum(value for _, value in bar.parts) for bar in bars), default=0.0) or 1.0

    def paint(axes: Axes) -> None:
        for place, bar in enumerate(bars):
            _bar(axes, place, bar, longest)
        _side(axes, axes.xaxis, x, [0.0, longest])
        _names(axes, [bar.name for bar in bars])

    return draw(paint, label, _tall([bar.name for bar in bars]))


def _bar(axes: Axes, place: int, bar: Stack, longest: float) -> None:
    left, total = 0.0, sum(value for _, value in bar.parts) or 1.0
    for style, value in bar.parts:
        axes.barh(place, value, left=left, height=0.68, color=style.colour, edgecolor=MARKS[GROUND], linewidth=0.8)
        if value / longest > 0.13:
            text = f"{100 * value / total:.0f} %"
            axes.text(left + value / 2, place, text, ha="center", va="center", fontsize=9, color=MARKS[GROUND])
        left += value


def heat(values: Sequence[Sequence[Number]], low: float, high: float, label: str) -> str:
    """values [layers][heads] from `low` to `high` as colours, the first layer on top; None stays empty."""
    rows, columns = len(values), max(map(len, values))
    filled = [
        [math.nan if cell is None else cell for cell in row] + [math.nan] * (columns - len(row)) for row in values
    ]

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.imshow(filled, cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="none")
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        for spine in axes.spines.values():
            spine.set_visible(True)

    return draw(paint, label, max(150, min(60 + 9 * rows, 420)))


def steps(series: Sequence[tuple[Style, Sequence[float]]], x: Axis, label: str) -> str:
    """Cumulative shares: one line for each series, with marks at the median and at 99 %."""

    def paint(axes: Axes) -> None:
        for style, values in series:
            xs, ys = _cumulative(sorted(values))
            axes.plot(xs, ys, color=style.colour, drawstyle="steps-post", linestyle=_dashed(style))
        for share in (0.5, 0.99):
            axes.axhline(share, color=MARKS[MUTED], linewidth=0.8, dashes=(2, 2))
        _side(axes, axes.xaxis, x, [value for _, values in series for value in values])
        _side(axes, axes.yaxis, Axis("share of all (%)", write=units.percent, low=0.0, high=1.0), [0.0, 1.0])

    return draw(paint, label)


def _cumulative(values: Sequence[float], most: int = 400) -> tuple[list[float], list[float]]:
    """Sorted values [n] -> at most `most` of them, each with the share of values up to it."""
    picked = sorted({round(place * (len(values) - 1) / (most - 1)) for place in range(most)})
    return [values[place] for place in picked], [(place + 1) / len(values) for place in picked]


def _side(axes: Axes, side: Side, axis: Axis, values: Sequence[float]) -> None:
    """Scale, label, marks and grid of one side of the chart."""
    scales = {"linear": _linear, "log": _log, "lengths": _lengths}
    scales[axis.scale](side, axis, values)
    side.set_label_text(axis.label)
    side.grid(True)
    if axis.rule is not None:
        across = axes.axhline if _upright(side) else axes.axvline
        across(axis.rule, color=MARKS[INK], linewidth=0.9, dashes=(3, 2))


def _linear(side: Side, axis: Axis, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    side.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    side.set_major_formatter(FuncFormatter(lambda value, _: axis.write(value)))
    room = 0.04 * ((max(values, default=1) if axis.high is None else axis.high) - (axis.low or 0.0))
    if axis.low is not None:
        _limits(side)(axis.low - (room if axis.high is not None else 0.0), None)
    if axis.high is not None:
        _limits(side)(None, axis.high + room)


def _log(side: Side, axis: Axis, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    _scale(side)("log", base=10)
    reach = [*values, *(end for end in (axis.low, axis.high) if end is not None)]
    low, high = min(reach, default=1.0) / 1.15, max(reach, default=1.0) * 1.15
    marks = marks_between(low, high)
    side.set_major_locator(FixedLocator(marks))
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, _: axis.write(value)))
    _limits(side)(min(low, marks[0]), max(high, marks[-1]))


def _lengths(side: Side, axis: Axis, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    _scale(side)("log", base=2)
    marks = apart(sorted(set(values)))
    side.set_major_locator(FixedLocator(marks))
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, _: axis.write(value)))
    if len(set(values)) < 2:
        _limits(side)(min(values, default=1.0) / 2, max(values, default=1.0) * 2)


def _upright(side: Side) -> bool:
    from matplotlib.axis import YAxis

    return isinstance(side, YAxis)


def _scale(side: Side) -> Callable[..., object]:
    return side.axes.set_yscale if _upright(side) else side.axes.set_xscale


def _limits(side: Side) -> Callable[[Number, Number], object]:
    return side.axes.set_ylim if _upright(side) else side.axes.set_xlim


def _names(axes: Axes, names: Sequence[str]) -> None:
    """The rows' names on the left, the first on top, and no grid between them."""
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _tall(names: Sequence[str]) -> int:
    """Pixels for a chart with these rows."""
    return 66 + sum(12 + 13 * (wrapped(name).count("\n") + 1) for name in names)
