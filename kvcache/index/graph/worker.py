"""A background thread that builds graphs."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from .ops import KeyGraph

logger = logging.getLogger(__name__)


class Job:
    """A graph that is being built."""

    def __init__(self, frames: Iterable[int], work: Callable[[], KeyGraph]) -> None:
        self.frames = frozenset(frames)
        self.done = threading.Event()
        self.cancelled = False
        self.graph: KeyGraph | None = None
        self._work: Callable[[], KeyGraph] | None = work

    def run(self) -> None:
        """Build the graph; a failure is logged, as masses come from codes without one."""
        work, self._work = self._work, None
        try:
            if work is not None and not self.cancelled:
                self.graph = work()
        except Exception:
            logger.exception("a graph could not be built; the codes go on answering")
        finally:
            self.done.set()


class Worker:
    """Runs jobs one after the other. Its thread starts with the first, and dies with the process or its owner."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._started = False

    def submit(self, job: Job) -> None:
        if not self._started:
            self._started = True
            threading.Thread(target=_serve, args=(self._jobs,), name="keysift-graphs", daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)
        self._jobs.put(job)


def _serve(jobs: SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
