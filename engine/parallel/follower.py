"""Follower process: replays the leader's changes of the page tables and runs the same forward passes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import torch
from transformers.utils import logging

from keysift.kvcache import PagedCache

from .. import ranks
from ..config import EngineConfig
from ..execution.forward import StepResult
from ..execution.runner import Runner
from ..memory.budget import make_cache
from ..model.load import load
from .orders import Order, replay
from .peers import Broken

POLL_S = 1.0
"""Seconds between checks for the leader's end, which a follower that waits inside of a GPU library does not notice."""


def main(descriptor: int, rank: int, size: int, rendezvous: Path) -> int:
    """Run until the leader ends. Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the leader, which may have requests to finish
    Thread(target=_exit_after, args=(os.getppid(),), daemon=True).start()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the leader reports it
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    pipe = Connection(descriptor)
    try:
        config, device = pipe.recv()
        pipe.send("ready")
        ranks.join(rank, size, rendezvous, device)
        _follow(pipe, config)
        ranks.leave()
    except EOFError:
        _remove_rendezvous(rendezvous)
        return 0
    except BaseException as error:
        try:
            pipe.send(Broken(f"{type(error).__name__}: {error}"))
            traceback.print_exc()
        except OSError:
            _remove_rendezvous(rendezvous)
        return 1
    return 0


def _remove_rendezvous(rendezvous: Path) -> None:
    """Remove the folder of the rendezvous file after the leader ended without doing so."""
    shutil.rmtree(rendezvous.parent, ignore_errors=True)


def _exit_after(leader: int) -> None:
    """End this process once its parent, the leader, has ended."""
    while os.getppid() == leader:
        time.sleep(POLL_S)
    os._exit(1)


def _follow(pipe: Connection, config: EngineConfig) -> None:
    """Load this rank's part of the model, then execute orders until None arrives."""
    model = load(config, _quiet)
    cache = make_cache(config, model, _quiet)
    runner = Runner(model, cache, config)
    while (order := pipe.recv()) is not None:
        pipe.send(_execute(runner, cache, order))


def _execute(runner: Runner, cache: PagedCache, order: Order) -> StepResult:
    """Execute an order. Returns the statistics of this rank's heads, without sampled tokens."""
    replay(cache, order)
    before = cache.tier.traffic
    _, telemetry = runner.compute(order.work, torch.tensor(order.last, dtype=torch.int64, device=cache.device))
    return runner.result(telemetry, before)


def _quiet(message: str) -> None:
    """Drop a progress message, which the leader reports."""


if __name__ == "__main__":
    descriptor, rank, size = map(int, sys.argv[1:4])
    sys.exit(main(descriptor, rank, size, Path(sys.argv[4])))
