"""Cores available for computation. Needs no compiled library."""

from __future__ import annotations

import os

import torch


def usable() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def num_threads() -> int:
    """The number of usable cores, but no more than the threads of torch."""
    return min(len(usable()), torch.get_num_threads())
