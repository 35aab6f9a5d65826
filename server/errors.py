"""Errors of the server and its client, and their mapping to gRPC status codes and back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from keysift.engine.errors import (
    DuplicateRequest,
    InvalidRequest,
    KeysiftError,
    ModelNotFound,
    ResourceExhausted,
    Unsupported,
)
from keysift.engine.request import Finish, FinishReason

from .logs import RateLimit

T = TypeVar("T")

logger = logging.getLogger(__name__)
logger.addFilter(RateLimit(burst=10, seconds=10))

MAX_MESSAGE_BYTES, MAX_FIELD_BYTES = 1000, 200
"""Longest error message and field name: both are sent in metadata, which peers limit to 8 KiB."""


class Unavailable(KeysiftError):
    """The server is loading, draining, failed or out of reach; `retry_after_s` is set if waiting may help."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthenticated(KeysiftError):
    """The bearer token is missing or wrong."""


class DeadlineExceeded(KeysiftError, TimeoutError):
    """The deadline of the call has passed; the server has freed the request."""


class Cancelled(KeysiftError):
    """The call was cancelled by the client."""


class Internal(KeysiftError):
    """The server has failed on the request, by a bug or a hardware fault, and has logged it."""


CODES: dict[type[KeysiftError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    DuplicateRequest: grpc.StatusCode.ALREADY_EXISTS,
    Unsupported: grpc.StatusCode.FAILED_PRECONDITION,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Internal: grpc.StatusCode.INTERNAL,
}
ERRORS = {code: error for error, code in CODES.items()}
ENDED = (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
"""What passes through handlers: the call has its status, or needs none."""


async def answered(context: grpc.aio.ServicerContext[Any, Any], call: str, work: Awaitable[T]) -> T | None:
    """Result of `work`, whose error ends the call with a status. `call` is the call's name in the log."""
    try:
        return await work
    except KeysiftError as error:
        failed = error
    except ENDED:
        raise
    except grpc.aio.InternalError as error:  # a write was blocked when the caller disconnected
        logger.debug("%s: the caller has disconnected (%s)", call, error)
        return None
    except BaseException as error:  # a Rust panic of the tokenizer is no Exception
        logger.exception("%s failed", call)
        failed = Internal(f"{call} failed with {type(error).__name__}; see the log of the server")
    # Outside the handlers: gRPC keeps what it raises here with the call, in a cycle, and that would keep the error with
    # its frames, which hold a message of megabytes, until garbage is collected.
    failed.__context__ = failed.__cause__ = failed.__traceback__ = None
    await abort(context, failed)
    return None


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: KeysiftError) -> None:
    """End the call with the status of an error."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


def failure(finish: Finish) -> KeysiftError | None:
    """Error of a finished request; None unless its reason is ERROR."""
    if finish.reason is not FinishReason.ERROR:
        return None
    kind = ResourceExhausted if finish.exhausted else Internal
    return kind(finish.error or "the engine has failed on this request")


def to_status(error: KeysiftError) -> Status:
    """Rich status of an error: BadRequest has the field, RetryInfo the time to wait."""
    status = Status(code=code(error).value[0], message=_shorten(str(error)))
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def _shorten(text: str, limit: int = MAX_MESSAGE_BYTES) -> str:
    """Text without its middle, if it has more than `limit` bytes."""
    encoded = text.encode(errors="replace")
    if len(encoded) > limit:
        encoded = encoded[: limit // 2] + b" ... " + encoded[-limit // 2 :]
    return encoded.decode(errors="ignore")


def code(error: BaseException) -> grpc.StatusCode:
    """Status code of an error; INTERNAL for one of another package."""
    known = (CODES[base] for base in type(error).__mro__ if base in CODES)
    return next(known, grpc.StatusCode.INTERNAL)


def _details(error: KeysiftError) -> list[Message]:
    if isinstance(error, InvalidRequest):
        field, problem = _shorten(error.field, MAX_FIELD_BYTES), _shorten(error.problem)
        return [BadRequest(field_violations=[BadRequest.FieldViolation(field=field, description=problem)])]
    if isinstance(error, ResourceExhausted | Unavailable) and error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        return [RetryInfo(retry_delay=delay)]
    return []


def from_call(call: grpc.RpcError) -> KeysiftError:
    """Error of a failed call, of the type that the server raised."""
    assert isinstance(call, grpc.Call)
    message, details = call.details() or "", rpc_status.from_call(call)
    error = ERRORS.get(call.code(), KeysiftError)
    if error is InvalidRequest:
        return _invalid_request(message, details)
    if error in (ResourceExhausted, Unavailable):
        return error(message, _retry_after(details))
    return error(message or call.code().name)


def _invalid_request(message: str, status: Status | None) -> InvalidRequest:
    for detail in status.details if status else ():
        bad = BadRequest()
        if detail.Unpack(bad):
            return InvalidRequest(bad.field_violations[0].field, bad.field_violations[0].description)
    return InvalidRequest("request", message)


def _retry_after(status: Status | None) -> float | None:
    for detail in status.details if status else ():
        retry = RetryInfo()
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToNanoseconds() / 1e9)
    return None
