"""gRPC service `keysift.v1.Inference`: parse, submit, reply."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import grpc

from keysift.engine.engine import Engine
from keysift.engine.errors import InvalidRequest, KeysiftError, ModelNotFound
from keysift.engine.job import Job
from keysift.engine.request import Finish, PromptInfo
from keysift.engine.version import keysift_version

from . import inference_pb2 as pb
from .convert import to_reply, to_request
from .errors import failure
from .guard import Guard
from .inference_pb2_grpc import InferenceServicer
from .limits import Limits
from .prompt import to_tokens
from .stream import Stream
from .tenants import CURRENT, Tenant
from .worker import Worker

Context = grpc.aio.ServicerContext[Any, Any]
Receive = Callable[[], Awaitable[bytes]]


class InferenceService(InferenceServicer):
    """Handlers of the service, on the event loop of the server; `Guard` receives their messages and sends errors."""

    def __init__(self, worker: Worker, guard: Guard, limits: Limits, share_prefix_cache: bool = False) -> None:
        self._worker, self._guard, self._limits = worker, guard, limits
        self._share_prefix_cache = share_prefix_cache
        self._started = time.monotonic()

    # The stub expects an iterator, but a cancelled one is cleaned up when it is collected, not at once. `Guard` passes
    # a function in place of the message, so that a full queue refuses before it is received and parsed.
    async def Generate(self, receive: Receive, context: Context) -> None:  # type: ignore[override]
        tenant = CURRENT.get()
        request_id, stream = await self._submit(receive, tenant)
        try:
            await self._guard.sent(context.send_initial_metadata((("x-request-id", request_id),)))
            await self._relay(stream, context, request_id)
        finally:
            self._worker.leave(tenant.internal(request_id), stream)

    async def _submit(self, receive: Receive, tenant: Tenant) -> tuple[str, Stream]:
        """Id and stream of the request that `receive` returns; its message is dropped when this is done."""
        self._worker.place(tenant).release()  # a body that is still coming must not keep a place
        body, arrival = await receive(), time.monotonic()
        with self._worker.place(tenant) as place, self._guard.bodies.hold(len(body)):
            message = await self._guard.parse(pb.GenerateRequest, body)
            request_id = message.request_id or uuid.uuid4().hex
            self._check(message, request_id, tenant)
            internal = tenant.internal(request_id)
            prepare = partial(self._job, message, internal, tenant, arrival)
            with named(internal):
                return request_id, await self._worker.submit(place, internal, len(body), prepare)

    async def _relay(self, stream: Stream, context: Context, request_id: str) -> None:
        while True:
            for output in await stream.take():
                if isinstance(output, PromptInfo):
                    output = replace(output, request_id=request_id)
                await self._guard.sent(context.write(to_reply(output)))
                if isinstance(output, Finish):
                    return _raise_failure(output)

    def _check(self, message: pb.GenerateRequest, request_id: str, tenant: Tenant) -> None:
        """Refuse what needs no preparation to be refused."""
        _check_id(request_id)
        tenant.check_priority(message.priority)
        name = model_name(self._worker.require_accepting())
        if message.model not in ("", name):
            raise ModelNotFound(f"model: {name!r}, which is served here, got {message.model!r}")

    def _job(self, message: pb.GenerateRequest, internal: str, tenant: Tenant, arrival: float, engine: Engine) -> Job:
        """Job of a message, on a thread of the preparation: megabytes of text take seconds to tokenise."""
        tokens = to_tokens(message, engine.tokenizer, engine.model.max_model_len)
        salt = message.kv.cache_salt if self._share_prefix_cache else tenant.salt(message.kv.cache_salt)
        return engine.prepare(to_request(message, internal, tokens, cache_salt=salt, arrival=arrival))

    async def Abort(self, message: pb.AbortRequest, context: Context) -> pb.AbortReply:
        tenant = CURRENT.get()
        distinct = dict.fromkeys(message.request_ids)
        return pb.AbortReply(request_ids=[name for name in distinct if self._worker.abort(tenant.internal(name))])

    async def GetModelInfo(self, message: pb.GetModelInfoRequest, context: Context) -> pb.ModelInfo:
        return model_info(self._worker.require_engine())

    async def GetServerInfo(self, message: pb.GetServerInfoRequest, context: Context) -> pb.ServerInfo:
        return self._server_info()

    def _server_info(self) -> pb.ServerInfo:
        engine = self._worker.engine
        return pb.ServerInfo(
            version=keysift_version(),
            state=pb.ServerState.Value(self._worker.state.name),
            uptime_s=time.monotonic() - self._started,
            max_message_bytes=self._limits.max_message_size,
            max_num_seqs=engine.config.max_num_seqs if engine else 0,
            max_queue=engine.config.max_queue if engine else 0,
            load=load(engine, self._worker.preparing) if engine else None,
        )


@contextmanager
def named(request_id: str) -> Iterator[None]:
    """Block whose unexpected errors say in the log which request met them."""
    try:
        yield
    except KeysiftError:
        raise
    except Exception as error:
        error.add_note(f"request {request_id}")
        raise


def _raise_failure(finish: Finish) -> None:
    if error := failure(finish):
        raise error


def _check_id(request_id: str) -> None:
    # The id is sent in metadata, which is ASCII, and written into one line of the log.
    if not (request_id.isascii() and request_id.isprintable()):
        raise InvalidRequest("request_id", f"printable ASCII, got {request_id!a}")


def model_name(engine: Engine) -> str:
    """Name that requests use."""
    return engine.config.served_model_name or engine.model.name


def model_info(engine: Engine) -> pb.ModelInfo:
    """Facts of the loaded model; head counts are of all ranks together."""
    model = engine.model
    return pb.ModelInfo(
        model=model_name(engine),
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        num_query_heads=model.num_query_heads * model.ranks,
        num_kv_heads=model.num_kv_heads * model.ranks,
        head_dim=model.head_dim,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        strategy=engine.config.strategy,
        eos_token_ids=sorted(model.eos_token_ids),
    )


def load(engine: Engine, preparing: int) -> pb.Load:
    """Load of the engine, read while its thread runs: plain integers, at most one step old.

    Requests that are `preparing` wait too.
    """
    status = engine.status
    return pb.Load(
        running=status.running,
        waiting=status.waiting + preparing,
        pages_free=status.pages_free,
        pages_total=status.pages_total,
        page_size=status.page_size,
    )
