"""Shared helpers of the benchmarks: timing, texts, structured inputs, quality readings, peers of the indexes."""
