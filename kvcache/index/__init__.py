"""Indexes: log masses of a query over the pages of a sequence, most of them without reading every key.

An entry lives at most as long as its pages: it is stored with their keys and written when a page becomes full, or it is
forgotten when one of its frames is about to be reused. So prefixes are shared, sequences forked and aborted without a
stale entry. See `Indexes` for which there are, and `Room` for the memory that they may take.
"""

from ..context import PageIndex
from .codes import CodeIndex
from .flat import FlatIndex
from .graph.index import Graph, GraphIndex
from .ivf.index import Ivf, IvfIndex
from .protocol import IndexSpec
from .summary import BoundIndex, MeanIndex

__all__ = [
    "BoundIndex",
    "CodeIndex",
    "FlatIndex",
    "Graph",
    "GraphIndex",
    "IndexSpec",
    "Ivf",
    "IvfIndex",
    "MeanIndex",
    "PageIndex",
]
