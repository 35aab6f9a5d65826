"""A rank that only computes: it does to its pages what the leader did to its own, and runs the same forward passes."""

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

from .. import ranks as group
from ..config import EngineConfig
from ..execution.forward import StepResult
from ..execution.runner import Runner
from ..memory.budget import make_cache
from ..model.load import load
from .orders import Order, replay
from .peers import Broken

LOOK_S = 1.0
"""How often to look whether the leader is still there: one that waits inside of a GPU's library is told by nobody."""


def main(descriptor: int, rank: int, size: int, rendezvous: Path) -> int:
    """Follow until the leader ends; the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the leader, which may have requests to finish
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the leader says it
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    pipe = Connection(descriptor)
    try:
        config, device = pipe.recv()
        pipe.send("here")
        group.join(rank, size, rendezvous, device)
        _follow(pipe, config)
        group.leave()
    except EOFError:
        _tidy_up(rendezvous)
        return 0
    except BaseException as error:
        try:
            pipe.send(Broken(f"{type(error).__name__}: {error}"))
            traceback.print_exc()
        except OSError:
            _tidy_up(rendezvous)
        return 1
    return 0


def _tidy_up(rendezvous: Path) -> None:
    """What the leader would have done, had it not ended without a word."""
    shutil.rmtree(rendezvous.parent, ignore_errors=True)


def _end_with(leader: int) -> None:
    while os.getppid() == leader:
        time.sleep(LOOK_S)
    os._exit(1)


def _follow(pipe: Connection, config: EngineConfig) -> None:
    model = load(config, _quiet)
    cache = make_cache(config, model, _quiet)
    runner = Runner(model, cache, config)
    while (order := pipe.recv()) is not None:
        pipe.send(_execute(runner, cache, order))


def _execute(runner: Runner, cache: PagedCache, order: Order) -> StepResult:
    """Do what is ordered; what this rank's heads read, no tokens with it."""
    replay(cache, order)
    before = cache.tier.traffic
    _, telemetry = runner.compute(order.work, torch.tensor(order.last, dtype=torch.int64, device=cache.device))
    return runner.result([], telemetry, before)


def _quiet(message: str) -> None:
    """The leader says it."""


if __name__ == "__main__":
    descriptor, rank, size = map(int, sys.argv[1:4])
    sys.exit(main(descriptor, rank, size, Path(sys.argv[4])))
