"""Attention ops: ``<op>.py`` is the torch reference, ``<op>_triton.py`` its CUDA twin, `native` holds the CPU twins."""

from .column_scores import ColumnScores, column_scores
from .paged_attention import paged_attention

__all__ = ["ColumnScores", "column_scores", "paged_attention"]
