"""Scheduling of sequences: admission, batching, preemption, and failures of single requests."""
