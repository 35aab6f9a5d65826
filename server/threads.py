"""Threads that parse, tokenise and check requests, off the event loop and off the engine's thread."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, TypeVar

T = TypeVar("T")

SHORT_BYTES = 2**14
"""Largest request of the thread that takes only short ones."""
SECONDS_PER_BYTE = 3e-6
"""How much later a longer request is due: about ten times what tokenising takes."""


@dataclass(order=True, slots=True)
class _Task:
    due: float
    number: int
    size: int = field(compare=False)
    work: Callable[[], Any] = field(compare=False)
    done: Future[Any] = field(compare=False)


class PreparationThreads:
    """A few threads and a queue.

    Short requests overtake long ones: a task is due at its arrival, and later by its length, so that a long one is not
    overtaken for ever. The first thread takes only short ones, which therefore never wait for a long one to end. How
    many tasks wait is for the caller to bound; a cancelled one leaves the queue at once, with all that it holds.
    """

    def __init__(self, threads: int) -> None:
        self._tasks: list[_Task] = []
        self._shorts: list[_Task] = []
        self._numbers = itertools.count()
        self._changed = Condition()
        self._closed = False
        self._threads = [
            Thread(target=self._work, args=(number == 0,), name=f"keysift-prepare-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Result of `work`, which runs on one of the threads; `size` is the length of its request in bytes."""
        done: Future[T] = Future()
        task = _Task(time.monotonic() + size * SECONDS_PER_BYTE, next(self._numbers), size, work, done)
        with self._changed:
            heapq.heappush(self._queue(size), task)
            self._changed.notify_all()
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            self._forget(task)
            raise
        finally:
            del (
                done,
                task,
                work,
            )  # an error keeps this frame, and they keep the error: with megabytes, until a collection

    def close(self) -> None:
        """End the threads, each after the task at hand."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        """A thread is still at work."""
        return any(thread.is_alive() for thread in self._threads)

    def _queue(self, size: int) -> list[_Task]:
        return self._shorts if size <= SHORT_BYTES else self._tasks

    def _forget(self, task: _Task) -> None:
        with self._changed:
            queue = self._queue(task.size)
            if task in queue:
                queue.remove(task)
                heapq.heapify(queue)

    def _work(self, only_short: bool) -> None:
        while task := self._next(only_short):
            _perform(task)
            del task  # and what it holds, while this thread waits

    def _next(self, only_short: bool) -> _Task | None:
        """The task that is due first; waits for one. None: closed."""
        with self._changed:
            while not self._closed:
                queues = [queue for queue in (self._shorts, [] if only_short else self._tasks) if queue]
                if queues:
                    return heapq.heappop(min(queues, key=lambda queue: queue[0]))
                self._changed.wait()
        return None


def _perform(task: _Task) -> None:
    if not task.done.set_running_or_notify_cancel():
        return
    try:
        result = task.work()
    except BaseException as error:  # a Rust panic of the tokenizer is no Exception
        task.done.set_exception(error)
        del task  # which keeps the error, which keeps this frame
    else:
        task.done.set_result(result)
