"""The other processes of a team, as its leader knows them."""

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

from ..errors import KeysiftError

FOLLOWER = "keysift.engine.parallel.follower"
GRACE_S = 5.0
"""What a follower gets to end by itself, or to tell why it has failed."""


class RankFailed(KeysiftError):
    """One of the processes that share a model cannot go on, so none of them can."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A follower's last words."""

    text: str


class Peer:
    """One follower. Plain data goes both ways through a pipe that nobody else can reach, and that ends with either."""

    def __init__(self, rank: int, size: int, rendezvous: Path) -> None:
        """Start it. It meets the other ranks in the file `rendezvous`."""
        self.name = f"rank {rank} of {size}"
        self._ended = False
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", FOLLOWER, *map(str, (theirs.fileno(), rank, size, rendezvous))]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=_environment(), stdin=subprocess.DEVNULL, stdout=2
        )
        theirs.close()

    def send(self, message: Any) -> None:
        """Raises `OSError` where it is not there any more."""
        self._pipe.send(message)

    def receive(self) -> Any:
        """Its next message. Raises `RankFailed` where that tells of its end, or it ends without one."""
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            raise self.death() from None
        if isinstance(message, Broken):
            raise RankFailed(f"{self.name} has failed: {message.text}")
        return message

    def poll_failure(self, wait_s: float = 0.0) -> RankFailed | None:
        """Why it cannot go on, if it tells so, or ends, within some seconds."""
        with suppress(EOFError, OSError):
            while self._pipe.poll(wait_s):
                if isinstance(message := self._pipe.recv(), Broken):
                    return RankFailed(f"{self.name} has failed: {message.text}")
            return None
        return self.death()

    def death(self) -> RankFailed:
        """Its pipe has ended, so it has, or is about to."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        return RankFailed(f"{self.name} has ended without a word (exit status {self._process.poll()})")

    def watch(self, hear: Callable[[RankFailed], None]) -> None:
        """Has `hear` called, on a thread of its own, should it end before `end`."""
        Thread(target=self._watch, args=(hear,), name=f"keysift-{self.name}", daemon=True).start()

    def _watch(self, hear: Callable[[RankFailed], None]) -> None:
        status = self._process.wait()
        if not self._ended:
            hear(RankFailed(f"{self.name} has ended (exit status {status})"))

    def request_stop(self) -> None:
        """Have it end once it has nothing else to do."""
        self._ended = True
        with suppress(OSError):
            self._pipe.send(None)

    def kill(self) -> None:
        self._ended = True
        self._process.kill()

    def end(self, wait_s: float) -> None:
        """Wait for its end so many seconds, and bring it about in the last resort."""
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe.close()


def _environment() -> dict[str, str]:
    """This process's, with all that it can import from: strategies may be a script's own."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
