"""Losses of sparse attention against dense: KL, top-1 agreement, needles and recall."""
