"""Attention ops: a folder each, with the torch reference, its Triton twin and its native twin for the CPU."""

from .column_scores import ColumnScores, column_scores
from .paged_attention import paged_attention

__all__ = ["ColumnScores", "column_scores", "paged_attention"]
