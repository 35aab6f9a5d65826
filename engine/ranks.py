"""The process group: what all ranks of one model do alike."""

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
"""How long a rank waits for the others inside of a forward pass. One that ends is noticed at once, where gloo talks."""


def join(rank: int, size: int, rendezvous: Path, device: str) -> None:
    """Become a rank of the group that meets in the file `rendezvous`; waits for the other ranks.

    Numbers on a CPU travel over the loopback interface, where there is one: nobody outside shall listen.
    """
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["LOCAL_RANK"] = str(rank)  # where transformers looks for the number of this process's GPU
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    if device == "cpu":
        share_cores(size)
    dist.init_process_group(backend, rendezvous.as_uri(), TIMEOUT, world_size=size, rank=rank)


def leave() -> None:
    """Be no rank any more."""
    os.environ.pop("LOCAL_RANK", None)
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def share_cores(size: int) -> None:
    """A part of the cores for this rank, unless somebody has said how many threads there are to be."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_threads() // size))


def local_device(device: torch.device, size: int) -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", dist.get_rank()) if size > 1 and device.type == "cuda" else device


def least(number: int, size: int) -> int:
    """The smallest of the numbers of all ranks, which all ask for it; with one rank, its own."""
    if size == 1:
        return number
    smallest = torch.tensor(number)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)
