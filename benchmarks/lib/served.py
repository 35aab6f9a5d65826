"""A `keysift serve` process on a free loopback port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import NamedTuple

START_SECONDS = 300
STOP_SECONDS = 60
KEPT = ("KEYSIFT_CACHE",)
"""The user's settings that the server takes."""
Report = Callable[[str], None]


class Served(NamedTuple):
    """A server that is ready."""

    process: subprocess.Popen[str]
    address: str


@contextmanager
def serve(*words: str, report: Report) -> Iterator[Served]:
    """Run `keysift serve` with these words until the block ends, its log passed to `report` line by line.

    Raises `SystemExit` if it does not become ready, or if its exit status is not 0.
    """
    command = [str(keysift()), "serve", "--port", "0", *words]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=own_environment())
    log: Queue[str] = Queue()
    follower = Thread(target=_follow, args=(server, log, report), daemon=True)
    follower.start()
    try:
        yield Served(server, wait_until_ready(log))
    finally:
        _stop(server)
        follower.join()
    if server.returncode:
        raise SystemExit(f"keysift serve ended with status {server.returncode}")


def _stop(server: subprocess.Popen[str]) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        raise


def keysift() -> Path:
    return Path(sysconfig.get_path("scripts")) / "keysift"


def own_environment() -> dict[str, str]:
    """The environment without the user's settings, except those of `KEPT`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KEYSIFT_") or name in KEPT}


def _follow(server: subprocess.Popen[str], log: Queue[str], report: Report) -> None:
    assert server.stderr is not None
    with server.stderr:
        for line in server.stderr:
            report(line.rstrip())
            log.put(line)
    log.put("")


def wait_until_ready(log: Queue[str]) -> str:
    """The address in the log, once the server is ready."""
    address, deadline = "", time.monotonic() + START_SECONDS
    with suppress(Empty):
        while line := log.get(timeout=max(deadline - time.monotonic(), 0)):
            if found := re.search(r"listening on (\S+)", line):
                address = found[1]
            if "ready: " in line:
                return address
    raise SystemExit(f"the server did not become ready within {START_SECONDS} s")
