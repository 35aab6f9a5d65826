"""Attention ops: ``<op>.py`` is the torch reference, ``<op>_triton.py`` its CUDA twin, `native` holds the CPU twins."""

from .paged_attention import paged_attention

__all__ = ["paged_attention"]
