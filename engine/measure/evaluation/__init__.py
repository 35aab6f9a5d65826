"""Offline long-context evaluation: what a strategy costs in answers, and in agreement with dense attention."""
