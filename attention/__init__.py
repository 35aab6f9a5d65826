"""Sparse attention: strategies choose pages, ops compute over them."""

from .attend import Attend, bind
from .contiguous import DenseKernel
from .failure import StrategyFailure
from .registry import DEFAULT, StrategyError, find, known, make, parse
from .strategy import Dense, Split, Strategy
from .telemetry import Telemetry
from .totals import Coverage, Locality, Reads
from .tracing import PARTS, Part, Spans, Stretch, untraced

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
    "StrategyFailure",
    "Stretch",
    "Telemetry",
    "bind",
    "find",
    "known",
    "make",
    "parse",
    "untraced",
]
