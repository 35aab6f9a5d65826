"""Which cores there are to compute on. Needs no compiled library, so that it can be asked where there is none."""

from __future__ import annotations

import os

import torch


def usable() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def num_threads() -> int:
    """As many threads as there are usable cores, but no more than torch uses."""
    return min(len(usable()), torch.get_num_threads())
