"""Interceptor of all calls: token, open calls, one bounded message in bounded time, and errors as statuses.

gRPC hands a call to Python with its headers, before its message. So each handler becomes one that takes a stream of
requests: it is refused without reading, or reads its one message within the limits.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import grpc
from google.protobuf import descriptor_pool, message_factory

from keysift.engine.errors import InvalidRequest, ResourceExhausted

from . import metrics
from .bodies import Bodies
from .errors import ENDED, DeadlineExceeded, Unauthenticated, abort, answered, code
from .limits import Limits
from .logs import RateLimit
from .parsing import Malformed, parse
from .tenants import ANYONE, CURRENT, Tenant, Tokens
from .threads import PreparationThreads

# Generic only in its stubs.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

PUBLIC_SERVICE = "/grpc.health.v1.Health/"
"""Service without a token: health probes send none, and its replies hold no secret."""
WATCH = f"{PUBLIC_SERVICE}Watch"
GENERATE = "/keysift.v1.Inference/Generate"
"""Method whose handler gets a function that receives its message in bytes: it takes a place before it parses them."""
PUBLIC_TURNS = 2
"""Messages of the public service that are received at once. A probe that finds no turn is answered for the server."""
INLINE_BYTES = 2**12
"""Largest message that is parsed on the event loop, where it takes less than a thread's answer."""
RETRY_S = 1.0

logger = logging.getLogger(__name__)
logger.addFilter(RateLimit(burst=1, seconds=10))


@dataclass(frozen=True, slots=True)
class Call:
    """A call: method and tenant."""

    method: str
    tenant: Tenant
    public: bool

    def owner(self, context: Context) -> str:
        """Key by which turns are shared: the tenant or, for callers without names, the address without its port."""
        return self.tenant.name or context.peer().rpartition(":")[0]

    @property
    def label(self) -> str:
        """Label in metrics: empty where no token is asked for."""
        return "" if self.public else self.tenant.label

    @property
    def max_size(self) -> str:
        """Limit of its message's size."""
        if self.public:
            return "max_public_size"
        return "max_message_size" if self.method == GENERATE else "max_control_size"


class Guard(grpc.aio.ServerInterceptor):
    """The only interceptor. `tokens` returns the tokens in force; None: callers need none."""

    def __init__(self, limits: Limits, tokens: Callable[[], Tokens] | None, threads: PreparationThreads) -> None:
        self._limits, self._tokens, self._threads = limits, tokens, threads
        self.bodies = Bodies(limits.max_receiving, limits.body_timeout, limits.max_body_bytes)
        self._public = Bodies(PUBLIC_TURNS, limits.body_timeout, limits.max_body_bytes)
        self._open: Counter[str] = Counter()

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        public = details.method.startswith(PUBLIC_SERVICE)
        tenant = ANYONE if public else self._tenant(details)
        if tenant is None:
            return grpc.stream_unary_rpc_method_handler(_refuse)
        handler = await continuation(details)
        return handler and self._guarded(handler, Call(details.method, tenant, public))

    def _tenant(self, details: grpc.HandlerCallDetails) -> Tenant | None:
        """Tenant of the call's token; None: it has none, or a wrong one."""
        if self._tokens is None:
            return ANYONE
        given = next((value for key, value in details.invocation_metadata if key == "authorization"), "")
        text = given.decode("latin-1") if isinstance(given, bytes) else given
        scheme, _, token = text.partition(" ")
        return self._tokens().find(token.strip().encode()) if scheme.lower() == "bearer" else None

    def _guarded(self, handler: Handler, call: Call) -> Handler:
        answer = partial(self._answer, handler, call)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)

    async def _answer(self, handler: Handler, call: Call, messages: Any, context: Context) -> Any:
        """The handler's answer; every error on the way ends the call with its status."""
        return await answered(context, call.method, self._counting(handler, call, context))

    async def _counting(self, handler: Handler, call: Call, context: Context) -> Any:
        try:
            CURRENT.set(call.tenant)
            with self._counted(call, context):
                return await self._handle(handler, call, context)
        except (*ENDED, grpc.aio.InternalError):
            raise
        except BaseException as error:
            metrics.REFUSALS.labels(call.label, code(error).name).inc()
            if isinstance(error, Malformed):
                logger.warning("%s from %s: %s", call.method, context.peer(), error)
            raise

    async def _handle(self, handler: Any, call: Call, context: Context) -> Any:
        if handler.request_streaming:
            async for reply in handler.stream_stream(self._messages(call, context), context):
                await self.sent(context.write(reply))
            return None
        receive = partial(self._one, call, context)
        message = receive if call.method == GENERATE else await self._parse(call, await receive())
        answer = handler.unary_stream if handler.response_streaming else handler.unary_unary
        assert inspect.iscoroutinefunction(answer), f"{call.method} is no coroutine function"
        return await answer(message, context)

    async def _one(self, call: Call, context: Context) -> bytes:
        """The message of a call that has one."""
        if (body := await self._receive(call, context)) is None:
            raise InvalidRequest("message", f"one {_kind(call.method).DESCRIPTOR.full_name}, got none")
        return body

    async def _messages(self, call: Call, context: Context) -> AsyncIterator[Any]:
        """Messages of a call that sends several; it ends when the next one does not come in time."""
        first = True
        while True:
            try:
                body = await self._receive(call, context)
            except (DeadlineExceeded, ResourceExhausted):
                if first:
                    raise
                return
            if body is None:
                return
            first = False
            yield await self._parse(call, body)

    async def _receive(self, call: Call, context: Context) -> bytes | None:
        """The next message; None: the caller has sent its last one."""
        bodies = self._public if call.public else self.bodies
        if call.public and bodies.full:
            return b""
        body = await bodies.receive(call.owner(context), context.read)
        if body is grpc.aio.EOF:
            return None
        if len(body) > (most := getattr(self._limits, call.max_size)):
            raise ResourceExhausted(f"message: at most {most:d} bytes ({call.max_size}), got {len(body)}")
        return bytes(body)

    async def _parse(self, call: Call, body: bytes) -> Any:
        return await self.parse(_kind(call.method), body)

    async def parse(self, kind: Any, body: bytes) -> Any:
        """Message of a body, made on another thread if it is long. Raises `InvalidRequest`."""
        work = partial(parse, kind, body, self._limits)
        return work() if len(body) <= INLINE_BYTES else await self._threads.run(0, work)  # milliseconds at any length

    async def sent(self, reply: Awaitable[Any]) -> None:
        """Wait until the caller takes a reply that is being written. Raises `DeadlineExceeded` if it does not."""
        try:
            async with asyncio.timeout(self._limits.reply_timeout):
                await reply
        except TimeoutError:
            most = self._limits.reply_timeout
            raise DeadlineExceeded(f"reply_timeout: a reply must be taken within {most:g} s, it was not") from None

    @contextmanager
    def _counted(self, call: Call, context: Context) -> Iterator[None]:
        """Count an open call. Raises `ResourceExhausted` for one too many."""
        bounds = self._bounds(call, context)
        for name, most in bounds.items():
            if self._open[name] >= most:
                raise ResourceExhausted(f"{name}: at most {most} calls are open at once, got another one", RETRY_S)
        self._open.update(bounds.keys())
        try:
            yield
        finally:
            self._open.subtract(bounds.keys())
            self._open = +self._open  # connections come and go

    def _bounds(self, call: Call, context: Context) -> dict[str, int]:
        """Bounds of the number of open calls, by the limit's name; none for probes, which end at once."""
        if call.public:
            watches = call.method == WATCH
            return {f"max_health_streams of {context.peer()}": self._limits.max_health_streams} if watches else {}
        bounds = {"max_streams": self._limits.max_streams}
        if call.tenant.streams is not None:
            bounds[f"streams of {call.tenant.name}"] = call.tenant.streams
        return bounds


async def _refuse(messages: Any, context: Context) -> None:
    metrics.REFUSALS.labels("", grpc.StatusCode.UNAUTHENTICATED.name).inc()
    problem = "authorization: metadata 'Bearer TOKEN' with a token of the server, got none or another"
    await abort(context, Unauthenticated(problem))


@cache
def _kind(method: str) -> Any:
    """Class of a method's requests, as the descriptors say."""
    service, _, name = method.removeprefix("/").partition("/")
    found = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    return message_factory.GetMessageClass(found.input_type)
