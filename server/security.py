"""TLS, mTLS and the bearer token."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from pydantic import SecretStr

from keysift.engine.errors import InvalidRequest

from .errors import Unauthenticated, answering
from .options import ServerConfig

PUBLIC_SERVICE = "/grpc.health.v1.Health/"
"""Service without a token: health probes send none, and its replies hold no secret."""

# Generic only in its stubs.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


class BearerToken(grpc.aio.ServerInterceptor):
    """Interceptor that refuses calls without ``authorization: Bearer TOKEN``, except to the health service."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        if details.method.startswith(PUBLIC_SERVICE) or self._is_authorized(details):
            return await continuation(details)
        return grpc.unary_unary_rpc_method_handler(_refuse)

    def _is_authorized(self, details: grpc.HandlerCallDetails) -> bool:
        given = next((value for key, value in details.invocation_metadata if key == "authorization"), "")
        return hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected)


async def _refuse(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    async with answering(context, "authentication"):
        raise Unauthenticated("authorization: metadata 'Bearer TOKEN' with the server's token, got none or another")


def interceptors(config: ServerConfig) -> list[grpc.aio.ServerInterceptor]:
    """Interceptors of the configuration: a `BearerToken`, or none without a token."""
    token = _token(config.api_key, config.api_key_file)
    return [] if token is None else [BearerToken(token)]


def _token(api_key: SecretStr | None, file: Path | None) -> str | None:
    if file:
        token = _read("api_key_file", file).decode().strip()
    elif api_key:
        token = api_key.get_secret_value()
    else:
        return None
    if not token:
        raise InvalidRequest("api_key_file", "a file with a token, got an empty one")
    return token


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """TLS credentials of the configuration; None without TLS."""
    if config.ssl_keyfile is None or config.ssl_certfile is None:
        return None
    pair = _read("ssl_keyfile", config.ssl_keyfile), _read("ssl_certfile", config.ssl_certfile)
    ca = _read("ssl_ca_certs", config.ssl_ca_certs) if config.ssl_ca_certs else None
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def client_credentials(ca: Path | None, key: Path | None, certificate: Path | None) -> grpc.ChannelCredentials:
    """TLS credentials of a client: without `ca` the public authorities; `key` and `certificate` for mTLS."""
    return grpc.ssl_channel_credentials(
        _read("ssl_ca_certs", ca) if ca else None,
        _read("ssl_keyfile", key) if key else None,
        _read("ssl_certfile", certificate) if certificate else None,
    )


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(field, f"a readable file, got {str(path)!r} ({error.strerror})") from None
