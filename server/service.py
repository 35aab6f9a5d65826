"""gRPC service `keysift.v1.Inference`: parse, submit, reply."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import grpc

from keysift.engine.engine import Engine
from keysift.engine.errors import InvalidRequest, ModelNotFound
from keysift.engine.request import Finish, Request
from keysift.engine.version import keysift_version

from . import inference_pb2 as pb
from .convert import to_reply, to_request
from .errors import answering, failure
from .inference_pb2_grpc import InferenceServicer
from .prompt import to_tokens
from .stream import Stream
from .worker import Worker

Context = grpc.aio.ServicerContext[Any, Any]

MAX_ID_LENGTH = 256


class InferenceService(InferenceServicer):
    """Handlers of the service, on the event loop of the server."""

    def __init__(self, worker: Worker, max_message_bytes: int) -> None:
        self._worker = worker
        self._max_message_bytes = max_message_bytes
        self._started = time.monotonic()

    # The stub expects an iterator, but a cancelled one is cleaned up when it is collected, not at once.
    async def Generate(self, message: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        request_id = message.request_id or uuid.uuid4().hex
        async with answering(context, f"Generate {request_id[:MAX_ID_LENGTH]}"):
            stream = await self._worker.submit(await self._parse(message, request_id))
            try:
                await context.send_initial_metadata((("x-request-id", request_id),))
                await _relay(stream, context)
            finally:
                self._worker.abort_stream(request_id, stream)

    async def _parse(self, message: pb.GenerateRequest, request_id: str) -> Request:
        _check_id(request_id)
        engine = self._worker.require_accepting()
        if message.model not in ("", model_name(engine)):
            raise ModelNotFound(f"model: {model_name(engine)!r}, which is served here, got {message.model!r}")
        # Megabytes of text take seconds to tokenise, and the loop must handle pings and health meanwhile.
        return await asyncio.to_thread(_to_request, message, request_id, engine)

    async def Abort(self, message: pb.AbortRequest, context: Context) -> pb.AbortReply:
        async with answering(context, "Abort"):
            return pb.AbortReply(request_ids=[name for name in message.request_ids if self._worker.abort(name)])

    async def GetModelInfo(self, message: pb.GetModelInfoRequest, context: Context) -> pb.ModelInfo:
        async with answering(context, "GetModelInfo"):
            return model_info(self._worker.require_engine())

    async def GetServerInfo(self, message: pb.GetServerInfoRequest, context: Context) -> pb.ServerInfo:
        async with answering(context, "GetServerInfo"):
            return self._server_info()

    def _server_info(self) -> pb.ServerInfo:
        engine = self._worker.engine
        return pb.ServerInfo(
            version=keysift_version(),
            state=pb.ServerState.Value(self._worker.state.name),
            uptime_s=time.monotonic() - self._started,
            max_message_bytes=self._max_message_bytes,
            max_num_seqs=engine.config.max_num_seqs if engine else 0,
            max_queue=engine.config.max_queue if engine else 0,
            load=load(engine) if engine else None,
        )


async def _relay(stream: Stream, context: Context) -> None:
    while True:
        for output in await stream.take():
            await context.write(to_reply(output))
            if isinstance(output, Finish):
                return _raise_failure(output)


def _raise_failure(finish: Finish) -> None:
    if error := failure(finish):
        raise error


def _check_id(request_id: str) -> None:
    if len(request_id) > MAX_ID_LENGTH:
        raise InvalidRequest("request_id", f"at most {MAX_ID_LENGTH} characters, got {len(request_id)}")
    # The id is sent in metadata, which is ASCII, and written into one line of the log.
    if not (request_id.isascii() and request_id.isprintable()):
        raise InvalidRequest("request_id", f"printable ASCII, got {request_id!a}")


def _to_request(message: pb.GenerateRequest, request_id: str, engine: Engine) -> Request:
    return to_request(message, request_id, to_tokens(message, engine.tokenizer, engine.model.max_model_len))


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
    )


def load(engine: Engine) -> pb.Load:
    """Load of the engine, read while its thread runs: plain integers, at most one step old."""
    status = engine.status
    return pb.Load(
        running=status.running,
        waiting=status.waiting,
        pages_free=status.pages_free,
        pages_total=status.pages_total,
        page_size=status.page_size,
    )
