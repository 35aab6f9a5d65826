"""Graphs over the keys, built from the prompt's own queries: RetrievalAttention's index (arXiv 2409.10516)."""
