"""Blocks of a page: sections of notes, tables, charts, definitions and samples. `page.html` renders each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from . import units
from .series import Style, Styles


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table."""

    text: str
    below: str = ""
    """A second, quieter line."""
    value: float | None = None
    """Sort key of the column; a cell without one is sorted as text."""
    tone: str = ""
    """`good`, `bad` or nothing."""
    heat: float | None = None
    """0 to 1: how strongly the cell is coloured as a loss."""
    style: Style | None = None
    """The series that the cell names."""

    @property
    def numeric(self) -> bool:
        return self.value is not None or self.text == units.NOTHING


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under column headings; wide tables scroll sideways."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True, slots=True)
class Chart:
    """An inline SVG and the words under it."""

    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Ramp:
    """Colour scale of a map: the values at its ends."""

    label: str
    low: str
    high: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """Charts that share one legend."""

    charts: Sequence[Chart]
    legend: Styles = field(default_factory=dict)
    swatch: bool = False
    """True if the legend shows areas, not lines."""
    ramps: Sequence[Ramp] = ()
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph, or a box where it is a warning."""

    text: str
    warning: bool = False
    kind: ClassVar[str] = "note"


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values in groups."""

    groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True, slots=True)
class Terms:
    """Definitions of terms."""

    terms: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "terms"


@dataclass(frozen=True, slots=True)
class Folded:
    """A block that is folded until it is opened."""

    summary: str
    block: Block
    kind: ClassVar[str] = "folded"


@dataclass(frozen=True, slots=True)
class Answer:
    """One strategy's answer to one sample."""

    cells: Sequence[Cell]
    wrong: bool
    answers: Sequence[str]
    generated: str
    prompt_tail: str


@dataclass(frozen=True, slots=True)
class Answers:
    """A table of answers, each with its texts to unfold."""

    columns: Sequence[str]
    rows: Sequence[Answer]
    kind: ClassVar[str] = "answers"


Block = Table | Gallery | Note | Facts | Terms | Folded | Answers


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with its blocks; a section without blocks is left out of the page."""

    id: str
    title: str
    blocks: Sequence[Block]


def text(value: object) -> Cell:
    return Cell(units.NOTHING if value is None or value == "" else str(value))


def number(value: object, write: units.Format, *, below: str = "", tone: str = "", heat: float | None = None) -> Cell:
    """A number as a cell; a dash for None."""
    return Cell(units.shown(value, write), below, units.known(value), tone, heat)


def named(strategy: str, styles: Styles) -> Cell:
    return Cell(strategy, style=styles.get(strategy))
