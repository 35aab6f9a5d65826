"""Colour, marker and dashes of each strategy, the same in every chart of a page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

INK, MUTED, GRID, GROUND = "ink", "muted", "grid", "ground"
COLOURS = 8
"""Number of colours `--s1`, `--s2` ... in `page.css`."""
ROLES = (INK, MUTED, GRID, GROUND, *(f"s{number + 1}" for number in range(COLOURS)))
MARKS = {role: f"#0f0e{number:02x}" for number, role in enumerate(ROLES)}
"""Placeholder colour of each role; `canvas` replaces it by the style sheet's variable."""

DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
MARKERS = {
    "o": "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "s": "M-3.2-3.2h6.4v6.4h-6.4z",
    "^": "M0-4L4 3.2H-4z",
    "D": "M0-4.4L4.4 0L0 4.4L-4.4 0z",
    "v": "M0 4L4-3.2H-4z",
    "P": "M-1.4-4h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z",
    "X": "M-4-2.2L-2.2-4L0-1.8L2.2-4L4-2.2L1.8 0L4 2.2L2.2 4L0 1.8L-2.2 4L-4 2.2L-1.8 0z",
    ">": "M4 0L-3.2 4V-4z",
    "<": "M-4 0L3.2 4V-4z",
}
"""SVG path around (0, 0) of each matplotlib marker, for the legend."""


@dataclass(frozen=True, slots=True)
class Style:
    """Colour, marker and dashes of one series."""

    role: str
    """The colour: `ink` or `s1` to `s8`."""
    marker: str
    dashes: tuple[float, ...] = ()

    @property
    def colour(self) -> str:
        return MARKS[self.role]

    @property
    def path(self) -> str:
        return MARKERS[self.marker]


Styles = dict[str, Style]


def style_of(strategies: Iterable[str]) -> Styles:
    """Dense in the colour of the text, the others in their order; after eight, colours return with other markers."""
    others = [name for name in dict.fromkeys(strategies) if name != "dense"]
    markers = list(MARKERS)[1:]
    styles = {"dense": Style(INK, "o")} if "dense" in strategies else {}
    for number, name in enumerate(others):
        turn = number // COLOURS
        marker = markers[(number + turn) % len(markers)]
        styles[name] = Style(f"s{number % COLOURS + 1}", marker, DASHES[(number + turn) % len(DASHES)])
    return styles


def parts_of(names: Iterable[str]) -> Styles:
    """Styles for parts of a total, or for several measures of one thing."""
    marks = list(MARKERS)
    unique = enumerate(dict.fromkeys(names))
    return {name: Style(f"s{number % COLOURS + 1}", marks[number % len(marks)]) for number, name in unique}
