"""Profiling: latency over strategies, prompt lengths and batch sizes, and its parts."""
