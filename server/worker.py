"""Live requests of a server: places, preparation, the engine's thread, and the streams of their outputs.

All of it belongs to the event loop's thread. Requests are prepared on threads of their own before they become commands
of the engine's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

from keysift.engine.engine import Engine
from keysift.engine.errors import DuplicateRequest
from keysift.engine.job import Job
from keysift.engine.request import Finish, FinishReason, Output, Sparsity, Timings, Usage

from . import metrics
from .engine_thread import EngineThread, engine_error
from .errors import Unavailable
from .places import Place, Places
from .stream import Stream
from .tenants import Tenant
from .threads import PreparationThreads

T = TypeVar("T")

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
        self._threads = threads
        self._places = Places()
        self._streams: dict[str, Stream] = {}
        self._preparing: dict[str, asyncio.Task[Any]] = {}
        self._unread: set[Stream] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = EngineThread(
            load, on_loaded=self._on_loaded, on_outputs=self._deliver, on_failed=self._on_failed
        )

    def start(self) -> None:
        """Start the thread, which loads the model first; `loaded` and `failed` follow it."""
        self.loaded: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()
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
        return self._thread.call(work)

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
        await self._thread.close(timeout)

    @property
    def alive(self) -> bool:
        """True while the thread runs; after `close`, True means that it did not end in time."""
        return self._thread.alive

    # Called back by the thread.

    def _on_loaded(self, engine: Engine) -> None:
        self.engine = engine
        self._places.room = engine.config.max_num_seqs + engine.config.max_queue
        if self.state is State.LOADING:
            self.state = State.READY
        self.loaded.set_result(engine)
        engine.group.watch(self._thread.report_process_ended)

    def _on_failed(self, error: BaseException) -> None:
        """Fail all streams and queued commands; the state keeps new commands out of the queue."""
        self.state = State.FAILED
        for stream in self._streams.values():
            stream.fail(engine_error(error))
        for request_id in tuple(self._streams):
            self._remove(request_id)
        self._thread.refuse_queued()
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


def _has_failed(done: asyncio.Future[Any]) -> bool:
    return done.cancelled() or done.exception() is not None
