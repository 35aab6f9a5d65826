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

OPEN_TO_ALL = "/grpc.health.v1.Health/"
"""Probes carry no token, and health tells nothing secret."""

# Generic only in its stubs.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


class BearerToken(grpc.aio.ServerInterceptor):
    """Refuses calls without ``authorization: Bearer TOKEN``, except to the health service."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        if details.method.startswith(OPEN_TO_ALL) or self._admits(details):
            return await continuation(details)
        return grpc.unary_unary_rpc_method_handler(_refuse)

    def _admits(self, details: grpc.HandlerCallDetails) -> bool:
        given = next((value for key, value in details.invocation_metadata if key == "authorization"), "")
        return hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected)


async def _refuse(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    async with answering(context, "authentication"):
        raise Unauthenticated("this server wants the metadata 'authorization: Bearer TOKEN' with its token")


def interceptors(config: ServerConfig) -> list[grpc.aio.ServerInterceptor]:
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
    """None where the configuration asks for no TLS."""
    if config.ssl_keyfile is None or config.ssl_certfile is None:
        return None
    pair = _read("ssl_keyfile", config.ssl_keyfile), _read("ssl_certfile", config.ssl_certfile)
    ca = _read("ssl_ca_certs", config.ssl_ca_certs) if config.ssl_ca_certs else None
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def client_credentials(ca: Path | None, key: Path | None, certificate: Path | None) -> grpc.ChannelCredentials:
    """`ca` None trusts the public authorities; `key` and `certificate` are the caller's own, for mTLS."""
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
