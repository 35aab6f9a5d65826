"""Indexes: what tells where the keys are that a query attends to, without reading them all.

Each is asked the same question: the log mass of every page, as far as it knows. What it knows lives and dies with the
pages: either it is stored beside their keys and written when a page becomes full, or it is forgotten when one of its
frames is about to hold something else. So prefixes are shared, sequences forked and aborted without a stale entry.
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
