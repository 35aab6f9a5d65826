"""Thread that owns the engine: it loads it, steps while there is work, and runs commands between two steps.

Commands come through one queue; results, outputs and failures return to the event loop with `call_soon_threadsafe`, in
order. So there is no lock, and a result never overtakes an output.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from keysift.engine.engine import Engine
from keysift.engine.request import Output

from .errors import Internal, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Command = tuple[Callable[[Engine], Any], "asyncio.Future[Any]"]


class EngineThread:
    """The thread and its queue. Public methods belong to the event loop's thread, on which the callbacks run, too."""

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        on_loaded: Callable[[Engine], None],
        on_outputs: Callable[[list[Output]], None],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self._load = load
        self._on_loaded, self._on_outputs, self._on_failed = on_loaded, on_outputs, on_failed
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="keysift-engine", daemon=True)

    def start(self) -> None:
        """Start to load the engine; the running event loop gets the callbacks."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True while the thread runs; after `close`, True means that it did not end in time."""
        return self._thread.is_alive()

    def call(self, work: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Run `work` between two steps."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._commands.put((work, done))
        return done

    def refuse_queued(self) -> None:
        """Fail the queued commands of an engine that has failed."""
        while not self._commands.empty():
            if command := self._commands.get_nowait():
                _resolve(command[1], None, Unavailable("the engine has failed"))

    async def close(self, timeout: float) -> None:
        """End the thread after its current step; waits at most `timeout` seconds, as loading cannot be interrupted."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, timeout)

    def report_process_ended(self, error: BaseException) -> None:
        """Fail at once when another process of the engine has ended, not at the next request. On any thread."""
        logger.error("%s", error)
        self._post(self._on_failed, error)

    # On the thread itself.

    def _run(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            return self._post(self._on_failed, error)
        _exempt_from_collection()
        self._post(self._on_loaded, engine)
        try:
            while self._execute_pending(engine):
                if outputs := engine.step():
                    self._post(self._on_outputs, outputs)
        # A Rust panic of the tokenizer is no Exception, and must not leave requests hanging either.
        except BaseException as error:
            logger.exception("the engine has failed")
            self._post(self._on_failed, error)
        finally:
            engine.close()

    def _execute_pending(self, engine: Engine) -> bool:
        """Run the queued commands, and wait for one while the engine has no work; returns False to end the thread."""
        try:
            command = self._commands.get(block=not engine.has_work)
            while command:
                self._execute(engine, *command)
                command = self._commands.get_nowait()
        except Empty:
            return True
        return False

    def _execute(self, engine: Engine, work: Callable[[Engine], T], done: asyncio.Future[T]) -> None:
        try:
            result = work(engine)
        except Exception as error:
            self._post(_resolve, done, None, error)
            del work, done  # which keep the error, which keeps this frame
        except BaseException as error:  # the engine fails with it; the caller of this command gets an error now
            self._post(_resolve, done, None, engine_error(error))
            raise
        else:
            self._post(_resolve, done, result, None)

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            logger.debug("the event loop is closed: dropped %s", callback.__name__)


def _exempt_from_collection() -> None:
    """Exempt all objects that are alive from garbage collection, which stops every thread while it looks at them.

    The imported modules are 400,000 objects: a full collection took 0.9 s, and up to 2 s on a busy machine.
    """
    gc.collect()
    gc.freeze()


def engine_error(error: BaseException) -> Internal:
    """Error for the callers of an engine that has failed."""
    return Internal(f"the engine has failed with {type(error).__name__}; see the log of the server")


def _resolve(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error:
        done.set_exception(error)
    else:
        done.set_result(result)
