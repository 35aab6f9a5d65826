"""Thread of the engine, and its bridge to the event loop.

The engine's thread owns the engine, the event loop's thread owns the streams and the state. Commands go to the engine
through one queue; outputs and results return with `call_soon_threadsafe`, in order. So there is no lock, and a result
never overtakes an output. Requests are prepared on threads of their own before they become commands.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from enum import Enum
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from keysift.engine.engine import Engine
from keysift.engine.errors import DuplicateRequest
from keysift.engine.job import Job
from keysift.engine.request import Finish, FinishReason, Output, Sparsity, Timings, Usage

from . import metrics
from .errors import Internal, Unavailable
from .places import Place, Places
from .stream import Stream
from .tenants import Tenant
from .threads import PreparationThreads

logger = logging.getLogger(__name__)

T = TypeVar("T")
Command = tuple[Callable[[Engine], Any], "asyncio.Future[Any]"]

RETRY_WHILE_LOADING_S = 2.0
RETRY_WHILE_DRAINING_S = 5.0


class State(Enum):
    """Life cycle of a server; a failure may follow any other state."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Worker:
    """Runner of one engine. All public methods belong to the event loop's thread; `start` runs inside the loop."""

    def __init__(self, load: Callable[[], Engine], threads: PreparationThreads) -> None:
        self.state = State.LOADING
        self.engine: Engine | None = None
        self._load = load
        self._threads = threads
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._places = Places()
        self._streams: dict[str, Stream] = {}
        self._preparing: dict[str, asyncio.Task[Any]] = {}
        self._unread: set[Stream] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = Thread(target=self._run, name="keysift-engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the model first; `loaded` and `failed` follow it."""
        self._loop = asyncio.get_running_loop()
        self.loaded: asyncio.Future[Engine] = self._loop.create_future()
        self.failed = asyncio.Event()
        self._thread.start()

    @property
    def preparing(self) -> int:
        """Requests that have a place, and are not in the engine yet."""
        return self._places.taken - len(self._streams) - len(self._unread) + len(self._preparing)

    def place(self, tenant: Tenant) -> Place:
        """A place for a request, taken before any work on it; raises `ResourceExhausted`, or `Unavailable`."""
        self.require_accepting()
        return self._places.take(tenant)

    async def submit(self, place: Place, request_id: str, size: int, prepare: Callable[[Engine], Job]) -> Stream:
        """Add the job that `prepare` makes of a message of `size` bytes, on a thread of the preparation.

        Raises the errors of `prepare` and of `Engine.add`, and `Unavailable` unless the engine is ready.
        """
        engine = self.require_accepting()
        if request_id in self._streams:
            raise DuplicateRequest(f"request_id: {place.tenant.external(request_id)!r} is already running")
        stream = self._streams[request_id] = Stream(place)
        place.kept = True
        self._idle.clear()
        try:
            job = await self._prepare(request_id, size, lambda: prepare(engine))
            if job is None or stream.aborted:
                return self._never_started(request_id, engine)
            added = self.call(lambda engine: engine.add(job))
        except BaseException:
            stream.left = True
            self._remove(request_id)
            raise
        added.add_done_callback(lambda added: self._remove(request_id) if _has_failed(added) else None)
        try:
            await asyncio.shield(added)
        except BaseException:
            self.leave(request_id, stream)
            raise
        finally:
            del added
        metrics.REQUESTS.labels(place.tenant.label).inc()
        return stream

    async def _prepare(self, request_id: str, size: int, work: Callable[[], Job]) -> Job | None:
        """The job, made on a thread of the preparation; None: it was aborted before."""
        task = asyncio.ensure_future(self._threads.run(size, work))
        self._preparing[request_id] = task
        metrics.PREPARING.set(self.preparing)
        try:
            return await task
        except asyncio.CancelledError:
            if (caller := asyncio.current_task()) and caller.cancelling():
                raise
            return None
        finally:
            del self._preparing[request_id], task, work  # an error keeps this frame, and the task keeps the error
            metrics.PREPARING.set(self.preparing)

    def _never_started(self, request_id: str, engine: Engine) -> Stream:
        """Stream of a request that was aborted before the engine had it."""
        stream = self._streams[request_id]
        sparsity = Sparsity(engine.config.strategy, 0.0, 0.0, None, False, 0, 0, None, 0.0)
        stream.put(Finish(request_id, FinishReason.CANCELLED, Usage(0, 0, 0), Timings(0, 0, 0, 0, 0), sparsity))
        self._remove(request_id)
        return stream

    def abort(self, request_id: str) -> bool:
        """Abort a request; returns True if it was live. Its id is in use until the engine has finished it."""
        if (stream := self._streams.get(request_id)) is None:
            return False
        stream.aborted = True  # its preparation may have ended, and `submit` not gone on yet
        if preparing := self._preparing.get(request_id):
            preparing.cancel()
        else:
            self.call(lambda engine: engine.abort(request_id)).add_done_callback(_has_failed)
        return True

    def leave(self, request_id: str, stream: Stream) -> None:
        """Read `stream` no further: abort its request, but not a newer one with the same id, and free its place."""
        stream.left = True
        if self._streams.get(request_id) is stream:
            self.abort(request_id)
        elif stream in self._unread:
            self._unread.remove(stream)
            stream.place.release()

    def abort_all(self) -> None:
        """Abort all live requests."""
        for request_id in tuple(self._streams):
            self.abort(request_id)

    async def idle(self) -> None:
        """Wait until no request is live."""
        await self._idle.wait()

    def call(self, work: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Run `work` on the engine's thread, between two steps."""
        self.require_engine()
        done: asyncio.Future[T] = self._loop.create_future()
        self._commands.put((work, done))
        return done

    def require_engine(self) -> Engine:
        """The engine; raises `Unavailable` before it is loaded and after it has failed."""
        if self.state is State.FAILED:
            raise Unavailable("the engine has failed; the server must be restarted")
        if self.engine is None:
            raise Unavailable("the model is loading", RETRY_WHILE_LOADING_S)
        return self.engine

    def require_accepting(self) -> Engine:
        """The engine; raises `Unavailable` also while the server drains."""
        if self.state is State.DRAINING:
            raise Unavailable("the server is shutting down", RETRY_WHILE_DRAINING_S)
        return self.require_engine()

    def drain(self) -> None:
        """Refuse new requests; live ones continue."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING

    async def close(self, timeout: float) -> None:
        """End the thread after its current step; waits at most `timeout` seconds, as loading cannot be interrupted."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, timeout)

    @property
    def alive(self) -> bool:
        """True while the thread runs; after `close`, True means that it did not end in time."""
        return self._thread.is_alive()

    # On the engine's thread.

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
                    self._post(self._deliver, outputs)
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
            self._post(_resolve, done, None, _engine_error(error))
            raise
        else:
            self._post(_resolve, done, result, None)

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            logger.debug("the event loop is closed: dropped %s", callback.__name__)

    # On a thread that watches the engine's other processes.

    def _on_process_ended(self, error: BaseException) -> None:
        """Fail at once when another process of the engine has ended, not at the next request."""
        logger.error("%s", error)
        self._post(self._on_failed, error)

    # On the event loop's thread again.

    def _on_loaded(self, engine: Engine) -> None:
        self.engine = engine
        self._places.room = engine.config.max_num_seqs + engine.config.max_queue
        if self.state is State.LOADING:
            self.state = State.READY
        self.loaded.set_result(engine)
        engine.group.watch(self._on_process_ended)

    def _on_failed(self, error: BaseException) -> None:
        """Fail all streams and queued commands; the state keeps new commands out of the queue."""
        self.state = State.FAILED
        for stream in self._streams.values():
            stream.fail(_engine_error(error))
        for request_id in tuple(self._streams):
            self._remove(request_id)
        while not self._commands.empty():
            if command := self._commands.get_nowait():
                _resolve(command[1], None, Unavailable("the engine has failed"))
        if not self.loaded.done():
            self.loaded.set_exception(error)
        self.failed.set()

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            if stream := self._streams.get(output.request_id):
                stream.put(output)
            if isinstance(output, Finish):
                self._remove(output.request_id)
                if stream:
                    metrics.observe_finish(stream.place.tenant, output)

    def _remove(self, request_id: str) -> None:
        if stream := self._streams.pop(request_id, None):
            if stream.left:
                stream.place.release()
            else:  # its outputs are in memory until they are read
                self._unread.add(stream)
        if not self._streams:
            self._idle.set()


def _exempt_from_collection() -> None:
    """Exempt all objects that are alive from garbage collection, which stops every thread while it looks at them.

    The imported modules are 400,000 objects: a full collection took 0.9 s, and up to 2 s on a busy machine.
    """
    gc.collect()
    gc.freeze()


def _engine_error(error: BaseException) -> Internal:
    return Internal(f"the engine has failed with {type(error).__name__}; see the log of the server")


def _resolve(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error:
        done.set_exception(error)
    else:
        done.set_result(result)


def _has_failed(done: asyncio.Future[Any]) -> bool:
    return done.cancelled() or done.exception() is not None
