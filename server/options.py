"""Configuration of the server and the client, and gRPC channel options for long contexts."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, SecretStr

from keysift.engine.checked import Checked
from keysift.engine.errors import InvalidRequest
from keysift.engine.request import SamplingParams

from .limits import Limits
from .tenants import GREATEST, LEAST

DEFAULT_MESSAGE_BYTES = 64 * 2**20
"""Largest message of a client; the server's own limit is smaller."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages with `role` and `content`."""

ChannelOptions = list[tuple[str, int]]


class ServerConfig(Checked):
    """Address, limits and security of the server."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(50051, ge=0, le=65535, description="port to listen on; 0: a free one, which the log names")
    metrics_host: str = Field("127.0.0.1", description="address of the Prometheus metrics")
    metrics_port: int = Field(0, ge=0, le=65535, description="HTTP port of the Prometheus metrics; 0: none")
    drain_timeout: float = Field(30.0, ge=0, description="seconds that running requests get after SIGTERM or SIGINT")
    api_key: SecretStr | None = Field(None, min_length=1, description="bearer token that clients must send")
    api_key_file: Path | None = Field(
        None,
        description="file with the bearer token, or with a line NAME TOKEN [streams=N] [queue=N] [priority=A..B] for "
        "each tenant; read again when it changes",
    )
    share_prefix_cache: bool = Field(
        False, description="let tenants find each other's cached prefixes, and so learn which ones are known"
    )
    ssl_keyfile: Path | None = Field(None, description="private key in PEM, for TLS")
    ssl_certfile: Path | None = Field(None, description="certificate chain in PEM, for TLS")
    ssl_ca_certs: Path | None = Field(None, description="CA of the clients' certificates in PEM, for mTLS")
    insecure: bool = Field(
        False,
        description="listen beyond loopback without TLS, or without a token or mTLS: whoever reaches the port can use "
        "the model, or read prompts, answers and tokens on their way",
    )

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise InvalidRequest("ssl_keyfile", "TLS takes both ssl_keyfile and ssl_certfile, got one")
        if self.ssl_ca_certs and not self.ssl_certfile:
            raise InvalidRequest("ssl_ca_certs", "mTLS takes ssl_keyfile and ssl_certfile too")
        if self.api_key and self.api_key_file:
            raise InvalidRequest("api_key_file", "either api_key or api_key_file, got both")
        if self.exposed and not self.insecure:
            raise InvalidRequest(
                "host",
                f"a loopback address, or TLS and tokens (or mTLS), or --insecure; got {self.host!r}, {self.exposed}",
            )

    @property
    def exposed(self) -> str:
        """Risks of a reachable address; empty on loopback, and with TLS and tokens or client certificates."""
        if is_loopback(self.host):
            return ""
        missing = [] if self.ssl_certfile else ["no TLS: prompts, answers and tokens can be read on their way"]
        if not (self.api_key or self.api_key_file or self.ssl_ca_certs):
            missing.append("no token: everybody can use the model")
        return "; ".join(missing)


def is_loopback(host: str) -> bool:
    """The address is one that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Document(Checked):
    """Prompt of `keysift generate`."""

    prompt: str | None = Field(None, description="text to complete")
    prompt_file: Path | None = Field(None, description="file with the text; - reads standard input")
    question: str | None = Field(None, description="question to append to the text")
    chat: bool = Field(False, description="format the prompt as a user's turn by the model's chat template")

    def value(self) -> Prompt:
        """The text, then the question; raises `InvalidRequest` unless exactly one text is given."""
        if (self.prompt is None) == (self.prompt_file is None):
            raise InvalidRequest("prompt", "one of --prompt and --prompt-file (- reads standard input)")
        text = self._read(self.prompt_file) if self.prompt_file else _text("prompt", str(self.prompt))
        content = f"{text}\n\n{_text('question', self.question)}" if self.question else text
        return [{"role": "user", "content": content}] if self.chat else content

    @staticmethod
    def _read(file: Path) -> str:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest("prompt_file", f"a readable text file, got {str(file)!r} ({error})") from None
        return _text("prompt_file", text)


def _text(field: str, text: str) -> str:
    """Check that the text is valid UTF-8: Python has surrogates in place of other bytes in arguments and stdin."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, f"text in UTF-8, got other bytes at character {error.start}") from None
    return text


class Sampling(Checked):
    """Fields of `SamplingParams` that have a flag."""

    max_new_tokens: int = Field(256, description="longest answer in tokens")
    temperature: float = Field(0.0, description="0: always the likeliest token")
    top_k: int = Field(0, description="number of likeliest tokens to sample from; 0: all")
    top_p: float = Field(1.0, description="probability of the likeliest tokens to sample from; 1: all")
    seed: int | None = Field(None, description="seed of a repeatable sampled answer")
    stop_strings: tuple[str, ...] = Field((), description="text that ends the answer, repeatable")

    def params(self) -> SamplingParams:
        return SamplingParams(**self.model_dump())


class Remote(Checked):
    """Connection to a running server, and the priority of requests there."""

    TAKES: ClassVar[str] = "only MODEL, --strategy and --strategy-arg of the engine's flags"

    address: str | None = Field(
        None, description=f"host:port of a running server, used instead of an engine in this process; it takes {TAKES}"
    )
    api_key: SecretStr | None = Field(None, min_length=1, description="bearer token of the server")
    tls: bool = Field(False, description="connect by TLS; implied by the ssl flags")
    ssl_ca_certs: Path | None = Field(None, description="CA of the server's certificate in PEM; none: the public ones")
    ssl_keyfile: Path | None = Field(None, description="private key of the client in PEM, for mTLS")
    ssl_certfile: Path | None = Field(None, description="certificate of the client in PEM, for mTLS")
    priority: int = Field(
        0,
        ge=LEAST,
        le=GREATEST,
        description="priority of requests at the server, which may bound it; smaller runs first",
    )


def pair(argument: str) -> tuple[str, str]:
    """Name and value of ``NAME.FIELD=VALUE``; raises `InvalidRequest` without an equals sign."""
    name, equals, value = argument.partition("=")
    if not equals:
        raise InvalidRequest("strategy_args", f"NAME.FIELD=VALUE, got {argument!r}")
    return name, value


def server_options(limits: Limits) -> ChannelOptions:
    """Options of the gRPC server, which bound its connections and what it holds for each."""
    return [
        *_message_limits(limits.max_message_size),
        ("grpc.max_metadata_size", limits.max_metadata_size),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_size),
        ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_connection_idle_ms", _milliseconds(limits.idle_timeout)),
        ("grpc.server_handshake_timeout_ms", _milliseconds(limits.handshake_timeout)),
        # Else the window of a stream that nobody reads yet grows to megabytes; that of a message that is read does.
        ("grpc.http2.bdp_probe", 0),
        # By default a client that pings during a silent prefill is disconnected after two pings in five minutes.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        # Detects clients whose machine is gone, so that their pages are freed.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # By default a second server on the same port starts without an error and takes half of the calls.
        ("grpc.so_reuseport", 0),
    ]


def _milliseconds(seconds: float) -> int:
    return round(min(seconds * 1000, 2**31 - 1))


def client_options(max_message_bytes: int, keepalive_s: float) -> ChannelOptions:
    return [
        *_message_limits(max_message_bytes),
        ("grpc.keepalive_time_ms", round(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _message_limits(max_message_bytes: int) -> ChannelOptions:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]
