"""Tensor parallelism: several processes share one model, each with some of its heads and their pages.

The leader, rank 0, is the process that was started: it schedules and samples. Each follower holds the same page tables
and runs the same forward passes, on orders that it receives as plain data. Pages are chosen per head, so ranks exchange
tensors only where transformers' plan for the model sums their results.
"""
