"""The background thread that builds graphs."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue

from .build import Cancelled
from .ops import KeyGraph

logger = logging.getLogger(__name__)


class Job:
    """A graph that is or was being built."""

    def __init__(self, work: Callable[..., KeyGraph]) -> None:
        """`work` takes `stopped`, and raises `Cancelled` soon after that has become true."""
        self.cancelled = False
        self.graph: KeyGraph | None = None
        """None: it is not built yet, or could not be."""
        self.done = threading.Event()
        self._work: Callable[..., KeyGraph] | None = work

    def run(self) -> None:
        """Build the graph, unless it was cancelled."""
        work, self._work = self._work, None
        try:
            if work is not None:
                self.graph = work(stopped=lambda: self.cancelled)
        except Cancelled:
            pass
        finally:
            self.done.set()

    def cancel(self) -> None:
        """Do not build the graph, or stop, as the pages of its keys are about to hold others."""
        self.cancelled, self._work = True, None


class Worker:
    """Queue of jobs and a thread that runs them one after the other, as long as others hold them."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[weakref.ref[Job] | None] = SimpleQueue()
        self._ending = False
        self._running: Job | None = None
        self._thread = threading.Thread(target=self._serve, name="keysift-graphs", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def submit(self, job: Job) -> None:
        self._jobs.put(weakref.ref(job))

    def _serve(self) -> None:
        while (queued := self._jobs.get()) is not None:
            self._running = queued()
            if self._running is not None and not self._ending:
                _try(self._running)
            self._running = None

    def _end(self) -> None:
        """Stop the job that runs and wait for it, before the process ends.

        A thread that comes back from C++ once the interpreter has ended takes the process down with SIGABRT.
        """
        self._ending = True
        if (job := self._running) is not None:
            job.cancel()
        self._jobs.put(None)
        self._thread.join()


def _try(job: Job) -> None:
    """Run a job; a failure is logged, as masses come from codes without its graph."""
    try:
        job.run()
    except BaseException:  # whatever it is, the thread goes on with the jobs of others
        logger.exception("a graph could not be built; the codes go on answering")


@cache
def _worker() -> Worker:
    """The worker of this process, started with its first job."""
    return Worker()


def submit(job: Job) -> None:
    """Run the job in the background, after those before it, as long as others hold it."""
    _worker().submit(job)
