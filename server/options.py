"""Configuration of the server and the client, and gRPC channel options for long contexts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ByteSize, Field, SecretStr

from keysift.engine.checked import Checked
from keysift.engine.errors import InvalidRequest
from keysift.engine.request import SamplingParams

MIB = 2**20
DEFAULT_MESSAGE_BYTES = 64 * MIB
"""Message limit: a prompt of a million tokens is about 5 MB of text, and gRPC's default is 4 MiB."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages with `role` and `content`."""

ChannelOptions = list[tuple[str, int]]


class ServerConfig(Checked):
    """Address, limits and security of the server."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(50051, ge=0, le=65535, description="port to listen on; 0: a free one, which the log names")
    metrics_port: int = Field(0, ge=0, le=65535, description="HTTP port of the Prometheus metrics; 0: none")
    max_message_size: ByteSize = Field(
        ByteSize(DEFAULT_MESSAGE_BYTES), ge=MIB, lt=2**31, description="largest request or reply, such as 64MiB"
    )
    drain_timeout: float = Field(30.0, ge=0, description="seconds that running requests get after SIGTERM or SIGINT")
    api_key: SecretStr | None = Field(None, min_length=1, description="bearer token that clients must send")
    api_key_file: Path | None = Field(None, description="file with the bearer token")
    ssl_keyfile: Path | None = Field(None, description="private key in PEM, for TLS")
    ssl_certfile: Path | None = Field(None, description="certificate chain in PEM, for TLS")
    ssl_ca_certs: Path | None = Field(None, description="CA of the clients' certificates in PEM, for mTLS")

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise InvalidRequest("ssl_keyfile", "TLS takes both ssl_keyfile and ssl_certfile, got one")
        if self.ssl_ca_certs and not self.ssl_certfile:
            raise InvalidRequest("ssl_ca_certs", "mTLS takes ssl_keyfile and ssl_certfile too")
        if self.api_key and self.api_key_file:
            raise InvalidRequest("api_key_file", "either api_key or api_key_file, got both")


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
    """Connection to a running server."""

    TAKES: ClassVar[str] = "only MODEL, --strategy and --strategy-arg of the engine's flags"

    address: str | None = Field(
        None, description=f"host:port of a running server, used instead of an engine in this process; it takes {TAKES}"
    )
    api_key: SecretStr | None = Field(None, min_length=1, description="bearer token of the server")
    tls: bool = Field(False, description="connect by TLS; implied by the ssl flags")
    ssl_ca_certs: Path | None = Field(None, description="CA of the server's certificate in PEM; none: the public ones")
    ssl_keyfile: Path | None = Field(None, description="private key of the client in PEM, for mTLS")
    ssl_certfile: Path | None = Field(None, description="certificate of the client in PEM, for mTLS")


def pair(argument: str) -> tuple[str, str]:
    """Name and value of ``NAME.FIELD=VALUE``; raises `InvalidRequest` without an equals sign."""
    name, equals, value = argument.partition("=")
    if not equals:
        raise InvalidRequest("strategy_args", f"NAME.FIELD=VALUE, got {argument!r}")
    return name, value


def server_options(max_message_bytes: int) -> ChannelOptions:
    return [
        *_message_limits(max_message_bytes),
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
