"""The engine's own thread, and the bridge between it and the event loop.

Each side owns its things and never touches the other's: the engine's thread owns the engine, the loop's thread owns the
streams and the state. Work goes in through one queue; outputs and results come back with `call_soon_threadsafe`, in
order. So there is no lock, and a result never overtakes an output.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from keysift.engine.engine import Engine
from keysift.engine.errors import DuplicateRequest
from keysift.engine.request import Finish, Output, Request

from .errors import Internal, Unavailable
from .stream import Stream

logger = logging.getLogger(__name__)

T = TypeVar("T")
Command = tuple[Callable[[Engine], Any], "asyncio.Future[Any]"]

RETRY_WHILE_LOADING_S = 2.0
RETRY_WHILE_DRAINING_S = 5.0


class State(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Worker:
    """Runs one engine. Every method belongs to the event loop's thread, and `start` must run inside the loop."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        self.state = State.LOADING
        self.engine: Engine | None = None
        self._load = load
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = Thread(target=self._run, name="keysift-engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.loaded: asyncio.Future[Engine] = self._loop.create_future()
        self.failed = asyncio.Event()
        self._thread.start()

    async def submit(self, request: Request) -> Stream:
        """Raises what `Engine.add` raises, and `Unavailable` unless the engine is ready."""
        self.accepting()
        if request.request_id in self._streams:
            raise DuplicateRequest(f"request_id: {request.request_id!r} is already running")
        stream = self._streams[request.request_id] = Stream()
        self._idle.clear()
        added = self.call(lambda engine: engine.add(request))
        added.add_done_callback(lambda added: self._forget(request.request_id) if _failed(added) else None)
        try:
            await asyncio.shield(added)
        except asyncio.CancelledError:
            self.abandon(request.request_id, stream)
            raise
        return stream

    def abort(self, request_id: str) -> bool:
        """Whether the request is live. Its id stays taken until the engine has let go of it."""
        if request_id not in self._streams:
            return False
        self.call(lambda engine: engine.abort(request_id)).add_done_callback(_failed)
        return True

    def abandon(self, request_id: str, stream: Stream) -> None:
        """Ends the request that `stream` belongs to; a newer one may carry its id by now, and runs on."""
        if self._streams.get(request_id) is stream:
            self.abort(request_id)

    def abort_all(self) -> None:
        for request_id in tuple(self._streams):
            self.abort(request_id)

    async def idle(self) -> None:
        """Waits until no request is live."""
        await self._idle.wait()

    def call(self, work: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Has the engine's thread do `work` between two steps."""
        self.living()
        done: asyncio.Future[T] = self._loop.create_future()
        self._commands.put((work, done))
        return done

    def living(self) -> Engine:
        """The engine; raises `Unavailable` while there is none."""
        if self.state is State.FAILED:
            raise Unavailable("the engine has failed; the server must be restarted")
        if self.engine is None:
            raise Unavailable("the model is being loaded", RETRY_WHILE_LOADING_S)
        return self.engine

    def accepting(self) -> Engine:
        """The engine, if new requests are welcome; raises `Unavailable` otherwise."""
        if self.state is State.DRAINING:
            raise Unavailable("the server is shutting down", RETRY_WHILE_DRAINING_S)
        return self.living()

    def drain(self) -> None:
        """Live requests run on, new ones are refused."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING

    async def close(self, timeout: float) -> None:
        """Ends the thread after its current step; waits at most `timeout` seconds, as loading cannot be interrupted."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, timeout)

    @property
    def alive(self) -> bool:
        """Whether the thread still runs; after `close`, that it did not end in time."""
        return self._thread.is_alive()

    # On the engine's thread.

    def _run(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            return self._post(self._on_failed, error)
        self._post(self._on_loaded, engine)
        try:
            while self._execute_pending(engine):
                if outputs := engine.step():
                    self._post(self._deliver, outputs)
        # A panic of the tokenizer's library is no Exception, and must not hang requests either.
        except BaseException as error:
            logger.exception("the engine has failed")
            self._post(self._on_failed, error)
        finally:
            engine.close()

    def _execute_pending(self, engine: Engine) -> bool:
        """Runs the commands that wait, sleeping for one while there is nothing else to do; False: the thread ends."""
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
            self._post(_settle, done, None, error)
        except BaseException as error:  # the engine fails with it, and this call must not wait for ever
            self._post(_settle, done, None, _death(error))
            raise
        else:
            self._post(_settle, done, result, None)

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            logger.debug("the event loop is closed: nobody is left to hear of %s", callback.__name__)

    # On some thread of the engine's team.

    def _hear_of_death(self, error: BaseException) -> None:
        """A process that the engine needs has ended: nobody has to ask for something first to find that out."""
        logger.error("%s", error)
        self._post(self._on_failed, error)

    # On the event loop's thread again.

    def _on_loaded(self, engine: Engine) -> None:
        self.engine = engine
        if self.state is State.LOADING:
            self.state = State.READY
        self.loaded.set_result(engine)
        engine.team.watch(self._hear_of_death)

    def _on_failed(self, error: BaseException) -> None:
        """From here on nothing is put into the queue, so whatever waits there can be answered now."""
        self.state = State.FAILED
        for stream in self._streams.values():
            stream.fail(_death(error))
        self._streams.clear()
        self._idle.set()
        while not self._commands.empty():
            if command := self._commands.get_nowait():
                _settle(command[1], None, Unavailable("the engine has failed"))
        if not self.loaded.done():
            self.loaded.set_exception(error)
        self.failed.set()

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            if stream := self._streams.get(output.request_id):
                stream.put(output)
            if isinstance(output, Finish):
                self._forget(output.request_id)

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        if not self._streams:
            self._idle.set()


def _death(error: BaseException) -> Internal:
    return Internal(f"the engine has failed with {type(error).__name__}; the server's log tells more")


def _settle(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error:
        done.set_exception(error)
    else:
        done.set_result(result)


def _failed(done: asyncio.Future[Any]) -> bool:
    return done.cancelled() or done.exception() is not None
