"""Process group of a model's ranks: joining, leaving, and values that all ranks share."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from keysift.kvcache.native.cores import num_threads

TIMEOUT = timedelta(minutes=10)
"""Longest wait for the other ranks within a forward pass. Over gloo a rank that ends is noticed at once."""


def join(rank: int, size: int, rendezvous: Path, device: str) -> None:
    """Join the process group that meets in the file `rendezvous`; waits for the other ranks.

    CPU tensors travel over the loopback interface, where there is one, so that they do not leave the machine.
    """
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["LOCAL_RANK"] = str(rank)  # transformers reads the index of this process's GPU there
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    if device == "cpu":
        share_cores(size)
    dist.init_process_group(backend, rendezvous.as_uri(), TIMEOUT, world_size=size, rank=rank)


def leave() -> None:
    """Leave the process group, if this process has joined one."""
    os.environ.pop("LOCAL_RANK", None)
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def share_cores(size: int) -> None:
    """Limit this rank's threads to its part of the cores, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_threads() // size))


def local_device(device: torch.device, size: int) -> torch.device:
    """Device of this rank: with several ranks on CUDA, the one of its number."""
    return torch.device("cuda", dist.get_rank()) if size > 1 and device.type == "cuda" else device


def smallest(number: int, size: int) -> int:
    """Smallest of the numbers of all ranks, each of which must call it; with one rank, its own."""
    if size == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)
