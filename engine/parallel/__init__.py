"""Tensor parallelism: several processes share one model, each with some of its heads and their pages.

The leader is the process that people started: it schedules, samples and speaks. The others follow: they hold the same
page tables and run the same forward passes, on orders that come as plain data. Which pages a head reads is its own
affair, so ranks only talk to each other where transformers' plan for the model adds up what they computed.
"""
