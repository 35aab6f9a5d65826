"""Strategies choose pages, ops compute over them."""

from .attend import Attend, bind
from .locality import Locality
from .registry import DEFAULT, StrategyError, find, known, make, parse
from .spans import PARTS, Part, Spans, Stretch, unwatched
from .strategy import Dense, Split, Strategy
from .telemetry import Coverage, Reads, Telemetry
from .whole import DenseKernel

__all__ = [
    "DEFAULT",
    "PARTS",
    "Attend",
    "Coverage",
    "Dense",
    "DenseKernel",
    "Locality",
    "Part",
    "Reads",
    "Spans",
    "Split",
    "Strategy",
    "StrategyError",
    "Stretch",
    "Telemetry",
    "bind",
    "find",
    "known",
    "make",
    "parse",
    "unwatched",
]
