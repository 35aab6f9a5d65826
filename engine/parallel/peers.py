"""Follower processes, seen from the leader: start, messages, failure and end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

from ..errors import EngineBroken

FOLLOWER = "keysift.engine.parallel.follower"
GRACE_S = 5.0
"""Seconds for a follower to end by itself, or to report a failure."""


class RankFailed(EngineBroken):
    """A rank cannot continue, so none of those that share the model can."""


@dataclass(frozen=True, slots=True)
class Broken:
    """Last message of a follower that failed."""

    text: str


class Peer:
    """One follower process, connected by a pipe that is private to the two and ends with either."""

    def __init__(self, rank: int, size: int, rendezvous: Path) -> None:
        """Start the process, which joins the other ranks in the file `rendezvous`."""
        self.name = f"rank {rank} of {size}"
        self._stopping = False
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", FOLLOWER, *map(str, (theirs.fileno(), rank, size, rendezvous))]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=_environment(), stdin=subprocess.DEVNULL, stdout=2
        )
        theirs.close()

    def send(self, message: Any) -> None:
        """Send a message. Raises `OSError` if the process has ended."""
        self._pipe.send(message)

    def receive(self) -> Any:
        """Next message. Raises `RankFailed` if that reports a failure, or the process ends without one."""
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            raise self.death() from None
        if isinstance(message, Broken):
            raise RankFailed(f"{self.name} has failed: {message.text}")
        return message

    def poll_failure(self, wait_s: float = 0.0) -> RankFailed | None:
        """Failure that the process reports, or shows by its end, within `wait_s` seconds."""
        with suppress(EOFError, OSError):
            while self._pipe.poll(wait_s):
                if isinstance(message := self._pipe.recv(), Broken):
                    return RankFailed(f"{self.name} has failed: {message.text}")
            return None
        return self.death()

    def death(self) -> RankFailed:
        """Error of a process whose pipe has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        return RankFailed(f"{self.name} has ended without a message (exit status {self._process.poll()})")

    def watch(self, on_failure: Callable[[RankFailed], None]) -> None:
        """Call `on_failure`, on a thread of its own, if the process ends before `request_stop`."""
        Thread(target=self._watch, args=(on_failure,), name=f"keysift-{self.name}", daemon=True).start()

    def _watch(self, on_failure: Callable[[RankFailed], None]) -> None:
        status = self._process.wait()
        if not self._stopping:
            on_failure(RankFailed(f"{self.name} has ended (exit status {status})"))

    def request_stop(self) -> None:
        """Ask the process to end after its current order."""
        self._stopping = True
        with suppress(OSError):
            self._pipe.send(None)

    def kill(self) -> None:
        """End the process now."""
        self._stopping = True
        self._process.kill()

    def end(self, wait_s: float) -> None:
        """Wait `wait_s` seconds for the process to end, then kill it."""
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe.close()


def _environment() -> dict[str, str]:
    """Environment of this process, with its import path: a strategy may be defined in a script's folder."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
