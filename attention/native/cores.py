"""How many threads compute. Needs no compiled library, so that it can be asked where there is none."""

from __future__ import annotations

import os

import torch


def num_threads() -> int:
    """The cores that this process may use, but no more than torch uses."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, torch.get_num_threads())
