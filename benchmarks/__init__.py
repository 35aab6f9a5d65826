"""Benchmarks: each module prints one table of README.md, run from the repository's root as `python -m benchmarks.x`."""
