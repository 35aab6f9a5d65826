"""Synchronous client, with the types of the engine."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from keysift.engine.errors import InvalidRequest
from keysift.engine.request import Output, SamplingParams

from . import inference_pb2 as pb
from .convert import fill, from_params, from_reply
from .errors import from_call
from .inference_pb2_grpc import InferenceStub
from .options import DEFAULT_MESSAGE_BYTES, Prompt, Remote, client_options
from .security import client_credentials


class Client:
    """Client of one server. Raises the engine's errors, such as `InvalidRequest`, and those of `keysift.server.errors`.

    `tls` is implied by any of the `ssl_` files; without `ssl_ca_certs` it trusts the public authorities.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: bool = False,
        ssl_ca_certs: Path | None = None,
        ssl_keyfile: Path | None = None,
        ssl_certfile: Path | None = None,
        max_message_bytes: int = DEFAULT_MESSAGE_BYTES,
        keepalive_s: float = 30.0,
    ) -> None:
        options = client_options(max_message_bytes, keepalive_s)
        if tls or ssl_ca_certs or ssl_keyfile or ssl_certfile:
            credentials = client_credentials(ssl_ca_certs, ssl_keyfile, ssl_certfile)
            self._channel = grpc.secure_channel(address, credentials, options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        self._stub = InferenceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        model: str = "",
        strategy: str = "",
        strategy_args: Mapping[str, str] | None = None,
        cache_salt: str = "",
        bypass_prefix_cache: bool = False,
        truncate_prompt_tokens: int | None = None,
        special_tokens_in_content: bool = False,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Iterator[Output]:
        """Outputs as they arrive; closing the iterator, or `timeout` seconds, ends the request on the server too.

        Control tokens that messages of a conversation spell are plain text, unless `special_tokens_in_content`.
        """
        message = from_params(params or SamplingParams())
        fill(message.kv, cache_salt=cache_salt, bypass_prefix_cache=bypass_prefix_cache)
        fill(
            message,
            request_id=request_id or uuid.uuid4().hex,
            model=model,
            strategy=strategy,
            strategy_args=strategy_args,
            truncate_prompt_tokens=truncate_prompt_tokens,
            priority=priority,
        )
        message.MergeFrom(_prompt(prompt))
        if message.HasField("chat"):
            fill(message.chat, special_tokens_in_content=special_tokens_in_content)
        return self._stream(message, timeout)

    def _stream(self, message: pb.GenerateRequest, timeout: float | None) -> Iterator[Output]:
        call = self._stub.Generate(message, timeout=timeout, metadata=self._metadata)
        try:
            for reply in call:
                # A newer server may send events that this client does not know.
                if reply.WhichOneof("event"):
                    yield from_reply(reply, message.request_id)
        except grpc.RpcError as error:
            raise from_call(error) from None
        finally:
            call.cancel()

    def abort(self, request_ids: Iterable[str], *, timeout: float | None = None) -> list[str]:
        """Abort requests; returns the ids of those that were live."""
        reply: pb.AbortReply = self._call("Abort", pb.AbortRequest(request_ids=request_ids), timeout)
        return list(reply.request_ids)

    def info(self, *, timeout: float | None = None) -> pb.ModelInfo:
        """Facts of the served model; raises `Unavailable` while it is loading."""
        info: pb.ModelInfo = self._call("GetModelInfo", pb.GetModelInfoRequest(), timeout)
        return info

    def server_info(self, *, timeout: float | None = None) -> pb.ServerInfo:
        """Version, state, load and limits of the server, in every state."""
        info: pb.ServerInfo = self._call("GetServerInfo", pb.GetServerInfoRequest(), timeout)
        return info

    def _call(self, method: str, message: Any, timeout: float | None) -> Any:
        try:
            return getattr(self._stub, method)(message, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_call(error) from None

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(remote: Remote) -> Client:
    """Client for the flags of a command; raises `InvalidRequest` without an address."""
    if remote.address is None:
        raise InvalidRequest("address", "host:port of a running server, got none")
    return Client(
        remote.address,
        api_key=remote.api_key.get_secret_value() if remote.api_key else None,
        tls=remote.tls,
        ssl_ca_certs=remote.ssl_ca_certs,
        ssl_keyfile=remote.ssl_keyfile,
        ssl_certfile=remote.ssl_certfile,
    )


def _prompt(prompt: Prompt) -> pb.GenerateRequest:
    try:
        if isinstance(prompt, str):
            return pb.GenerateRequest(text=prompt)
        if isinstance(prompt, bytes):
            raise TypeError("bytes")
        if len(prompt) and isinstance(prompt[0], Mapping):
            return pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(**turn) for turn in prompt]))  # type: ignore[arg-type]
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt))  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise InvalidRequest(
            "prompt", f"text, token ids or chat messages, got {type(prompt).__name__} ({error})"
        ) from None
