"""The parts of the charts: numbers in words, marks of axes, colours that are told apart."""

from __future__ import annotations

import math
import re
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keysift.engine.measure.reports import axes, units
from keysift.engine.measure.reports.charts import Axis, Line, Span, heat, lines, spans
from keysift.engine.measure.reports.page import part
from keysift.engine.measure.reports.series import COLOURS, MARKERS, ROLES, style_of


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (units.seconds, 0.0123, "12.3 ms"),
        (units.seconds, 8.5e-5, "85.0 µs"),
        (units.seconds, 725, "12 min 5 s"),
        (units.seconds, 7800, "2 h 10 min"),
        (units.time_mark, 3.0, "3 s"),
        (units.time_mark, 0.3, "300 ms"),
        (units.milliseconds, 4560.0, "4.56 s"),
        (units.tokens, 4096, "4k"),
        (units.tokens, 4000, "4,000"),
        (units.percent, 0.938, "93.8 %"),
        (units.percent, 1.0, "100 %"),
        (units.percent, 0.00123, "0.12 %"),
        (units.percent, 0, "0 %"),
        (units.points, -0.25, "−25"),
        (units.points, 0.0153, "+1.5"),
        (units.points, -1e-9, "0"),
        (units.size, 1.5 * 2**30, "1.5 GiB"),
        (units.size, 0, "0 B"),
        (units.times, 0.556, "0.56×"),
        (units.significant, 1234.5, "1,234"),
        (units.significant, 0.00123, "0.00123"),
        (units.significant, 1.23e-6, "1.23e−06"),
        (units.short, 2e-6, "2e−6"),
        (units.short, 100.0, "100"),
        (units.decades, 1e-3, "1e−3"),
        (units.decades, 3e-7, "3e−7"),
        (units.decades, 0.01, "0.01"),
        (units.signed, 0.5, "+0.500"),
    ],
)
def test_numbers_are_written_short_and_with_their_unit(write: units.Format, value: float, text: str) -> None:
    assert write(value) == text


@pytest.mark.parametrize("value", [None, "3", True, float("nan"), float("inf"), []])
def test_what_is_no_number_is_a_dash(value: object) -> None:
    assert units.shown(value, units.percent) == "–"


@given(st.floats(-7, 9), st.floats(0.12, 9))
def test_an_axis_has_three_to_eight_marks_inside_its_ends(start: float, decades: float) -> None:
    low, high = 10.0**start, 10.0 ** (start + decades)
    marks = axes.marks_between(low, high)
    assert 3 <= len(marks) <= 8
    assert marks == sorted(set(marks))
    assert all(low * 0.999 <= mark <= high * 1.001 for mark in marks)


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=30, unique=True).map(sorted))
def test_marks_of_lengths_keep_their_distance(lengths: list[int]) -> None:
    marks = axes.apart(lengths)
    assert 1 <= len(marks) <= 12
    assert marks[-1] == lengths[-1]
    assert set(marks) <= set(lengths)


@given(st.text(st.sampled_from("abc+,(=) _"), min_size=1, max_size=120).filter(str.strip))
def test_a_long_name_fits_in_three_lines(name: str) -> None:
    rows = axes.wrapped(name).split("\n")
    assert len(rows) <= axes.NAME_LINES
    assert all(len(row) <= axes.NAME_CHARS for row in rows)
    if not axes.wrapped(name).endswith("…"):
        assert "".join(rows).replace(" ", "") == name.replace(" ", "")


def palette(dark: bool) -> dict[str, str]:
    """The colours of the style sheet by their role."""
    blocks = re.findall(r":root \{(.*?)\}", part("page.css"), re.DOTALL)
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[dark]))


def linear(colour: str) -> list[float]:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def luminance(colour: str) -> float:
    red, green, blue = linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_the_ground(dark: bool) -> None:
    """3:1 for lines and marks, 4.5:1 for text, as WCAG asks."""
    colours = palette(dark)
    assert set(ROLES) <= set(colours)
    for number in range(1, COLOURS + 1):
        assert contrast(colours[f"s{number}"], colours["ground"]) >= 3
    for role in ("ink", "muted", "link", "lost", "gain"):
        assert min(contrast(colours[role], colours[ground]) for ground in ("ground", "panel")) >= 4.5


SIGHTS = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red cones": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "no green cones": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "no blue cones": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}
"""Linear RGB as each eye sees it (Machado, Oliveira and Fernandes, 2009)."""


def lab(colour: str, sight: tuple[tuple[float, ...], ...]) -> tuple[float, float, float]:
    """A colour in CIELAB, where distances are differences that are seen."""
    seen = [sum(map(float.__mul__, map(float, row), linear(colour))) for row in sight]
    rows = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8728))  # XYZ, white at 1
    x, y, z = (max(sum(map(float.__mul__, row, seen)), 0.0) ** (1 / 3) for row in rows)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_are_told_apart_by_every_eye(sight: str, dark: bool) -> None:
    colours = palette(dark)
    seen = [lab(colours[role], SIGHTS[sight]) for role in ("ink", *(f"s{number + 1}" for number in range(COLOURS)))]
    assert min(math.dist(one, other) for one, other in combinations(seen, 2)) > 18


def test_no_two_strategies_look_alike() -> None:
    """Not among twenty, and among nine no two share a colour or a marker: a printout in grey can be read."""
    styles = style_of(["dense", *(f"s{number}" for number in range(20))])
    assert len(set(styles.values())) == 21
    first = list(styles.values())[:9]
    assert all(one.role != other.role and one.marker != other.marker for one, other in combinations(first, 2))
    assert {style.marker for style in styles.values()} <= set(MARKERS)


def test_a_strategy_looks_the_same_whatever_its_name() -> None:
    assert style_of(["a", "dense", "b"])["b"] == style_of(["dense", "x", "y"])["y"]


def test_names_reach_the_chart_as_they_are() -> None:
    """Neither taken for markup nor for mathematics."""
    style = style_of(["dense"])["dense"]
    svg = spans([Span("a $x$ <b>&_", style, 1.0)], Axis("KL (nats)", "log"), 'a "label" <')
    assert "a $x$" in svg
    assert "<b>" not in svg
    assert 'aria-label="a &quot;label&quot; &lt;"' in svg


def test_hollow_points_have_the_colour_of_the_ground() -> None:
    style = style_of(["a"])["a"]
    x, y = Axis("length (tokens)", "lengths", units.tokens), Axis("time (s)", "log")
    plain = lines([Line(style, [1, 2], [1.0, 2.0])], x, y, "plain")
    hollow = lines([Line(style, [1, 2], [1.0, 2.0], hollow=[False, True])], x, y, "hollow")
    assert "var(--ground)" not in plain
    assert "fill: var(--ground); stroke: var(--s1)" in hollow


def test_a_map_is_an_image_with_its_cells_and_holes_stay_empty() -> None:
    svg = heat([[0.5, None], [], [1.0, 0.1]], 0.0, 1.0, "coverage")
    assert 'width="2" height="3"' in svg
    assert 'href="data:image/png;base64,iVBOR' in svg
    assert "query head" in svg
    assert "layer" in svg
