"""Strategies choose pages, ops compute over them."""

from .attend import Attend, bind
from .locality import Locality
from .registry import DEFAULT, StrategyError, known, make, parse
from .strategy import Dense, Split, Strategy
from .telemetry import Coverage, Reads, Telemetry

__all__ = [
    "DEFAULT",
    "Attend",
    "Coverage",
    "Dense",
    "Locality",
    "Reads",
    "Split",
    "Strategy",
    "StrategyError",
    "Telemetry",
    "bind",
    "known",
    "make",
    "parse",
]
