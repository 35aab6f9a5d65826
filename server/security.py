"""TLS credentials and tokens of a configuration, read again when their files change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc

from .certificates import read, read_authority, read_pair
from .options import ServerConfig
from .reloading import Reloaded
from .tenants import TokenFile, Tokens, single


def tokens(config: ServerConfig) -> Callable[[], Tokens] | None:
    """Function that returns the tokens in force; None where callers need none. Raises `InvalidRequest`."""
    if config.api_key_file:
        return Reloaded((config.api_key_file,), TokenFile(config.api_key_file))
    if config.api_key:
        found = single(config.api_key.get_secret_value())
        return lambda: found
    return None


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """TLS credentials of the configuration; None without TLS. Raises `InvalidRequest` naming the file and the fault."""
    if config.ssl_keyfile is None or config.ssl_certfile is None:
        return None
    paths = [path for path in (config.ssl_keyfile, config.ssl_certfile, config.ssl_ca_certs) if path]
    current = Reloaded(paths, partial(_certificates, config.ssl_keyfile, config.ssl_certfile, config.ssl_ca_certs))
    return grpc.dynamic_ssl_server_credentials(
        current(),
        Changes(current),  # type: ignore[arg-type]  # the stub lacks the None
        require_client_authentication=config.ssl_ca_certs is not None,
    )


class Changes:
    """Certificates for gRPC, which asks with each handshake, if they are others than before; None otherwise."""

    def __init__(self, current: Reloaded[grpc.ServerCertificateConfiguration]) -> None:
        self._current = current
        self._last = current()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        if (found := self._current()) is self._last:
            return None
        self._last = found
        return found


def _certificates(key: Path, chain: Path, ca: Path | None) -> grpc.ServerCertificateConfiguration:
    authority = read_authority("ssl_ca_certs", ca) if ca else None
    return grpc.ssl_server_certificate_configuration([read_pair(key, chain)], root_certificates=authority)


def client_credentials(ca: Path | None, key: Path | None, certificate: Path | None) -> grpc.ChannelCredentials:
    """TLS credentials of a client: without `ca` the public authorities; `key` and `certificate` for mTLS."""
    return grpc.ssl_channel_credentials(
        read("ssl_ca_certs", ca) if ca else None,
        read("ssl_keyfile", key) if key else None,
        read("ssl_certfile", certificate) if certificate else None,
    )
