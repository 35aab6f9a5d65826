"""Limits of what callers may send: one table, each row a flag of `keysift serve`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ByteSize, Field

from keysift.engine.checked import Checked
from keysift.engine.errors import InvalidRequest

from . import inference_pb2 as pb

KIB, MIB = 2**10, 2**20
MAP_ENTRY_FIELDS = 3
"""Fields of one entry of a map: itself, its key and its value."""
OTHER_FIELDS = 1024
"""Room for fields that are no list, and for numbers of lists that are not packed."""


class Limits(Checked):
    """Bounds of every message, call and connection. A message above one is refused before any other work."""

    max_message_size: ByteSize = Field(
        ByteSize(8 * MIB),
        ge=MIB,
        lt=2**31,
        description="largest Generate request and largest reply, such as 64MiB; a million tokens are 3 to 6 MB",
    )
    max_control_size: ByteSize = Field(
        ByteSize(128 * KIB), ge=KIB, lt=2**31, description="largest request of any other method"
    )
    max_public_size: ByteSize = Field(
        ByteSize(4 * KIB), ge=KIB, lt=2**31, description="largest request that needs no token: the health service's"
    )
    max_token_ids: int = Field(
        2**21, ge=1, description="token ids of a prompt before its truncation, with all other lists of a message"
    )
    max_string_size: ByteSize = Field(
        ByteSize(64 * KIB), ge=KIB, description="string of a message, but for text and content of a prompt"
    )
    max_turns: int = Field(1024, ge=1, description="turns of a chat")
    max_role_length: int = Field(64, ge=1, description="characters of the role of a turn")
    max_id_length: int = Field(256, ge=32, description="characters of a request id")
    max_model_length: int = Field(256, ge=1, description="characters of the name of a model")
    max_strategy_length: int = Field(256, ge=1, description="characters of the name of a strategy")
    max_strategy_args: int = Field(64, ge=0, description="options of a strategy")
    max_strategy_arg_length: int = Field(256, ge=1, description="characters of an option's name, and of its value")
    max_salt_length: int = Field(256, ge=0, description="characters of a cache salt")
    max_stop_strings: int = Field(64, ge=0, le=64, description="stop strings")
    max_stop_string_length: int = Field(1024, ge=1, description="characters of a stop string")
    max_stop_characters: int = Field(8192, ge=1, description="characters of all stop strings together")
    max_stop_token_ids: int = Field(1024, ge=0, description="stop tokens")
    max_logit_bias: int = Field(1024, ge=0, description="tokens with a bias")
    max_allowed_token_ids: int = Field(2**16, ge=0, description="tokens of a list of the only allowed ones")
    max_abort_ids: int = Field(256, ge=1, description="request ids of one Abort")
    max_metadata_size: ByteSize = Field(
        ByteSize(16 * KIB), ge=4 * KIB, lt=2**24, description="metadata of a call, as HTTP/2 counts it"
    )
    max_connections: int = Field(512, ge=1, description="open connections; more are closed at once")
    max_streams_per_connection: int = Field(128, ge=1, description="open calls of one connection; more wait there")
    max_streams: int = Field(1024, ge=1, description="open calls in all, without those of the health service")
    max_health_streams: int = Field(8, ge=1, description="open Watch calls of the health service by one connection")
    max_receiving: int = Field(
        16, ge=1, description="requests that are received at once; each may take max_message_size while it is"
    )
    max_body_bytes: ByteSize = Field(
        ByteSize(256 * MIB), ge=MIB, description="requests above 64 KiB in memory that wait for their preparation"
    )
    body_timeout: float = Field(30.0, gt=0, description="seconds in which a request must have been received")
    reply_timeout: float = Field(60.0, gt=0, description="seconds in which a caller must have taken a reply")
    handshake_timeout: float = Field(10.0, gt=0, description="seconds in which a connection must be set up")
    idle_timeout: float = Field(300.0, ge=1, description="seconds after which a connection without a call is closed")
    preparation_threads: int = Field(
        2, ge=2, le=64, description="threads that tokenise and check requests; one of them takes only short ones"
    )

    @property
    def max_fields(self) -> int:
        """Fields of a message on the wire, those of nested messages included: all that the other limits allow."""
        turns = self.max_turns * (1 + len(pb.ChatMessage.DESCRIPTOR.fields))
        entries = MAP_ENTRY_FIELDS * (self.max_logit_bias + self.max_strategy_args)
        return OTHER_FIELDS + turns + entries + self.max_stop_strings + self.max_abort_ids


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit of a message's content: the field that it bounds, its unit, and the value in a message."""

    limit: str
    field: str
    unit: str
    measure: Callable[[Any], int]


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)


GENERATE = (
    Rule("max_id_length", "request_id", "characters", lambda m: len(m.request_id)),
    Rule("max_model_length", "model", "characters", lambda m: len(m.model)),
    Rule("max_strategy_length", "strategy", "characters", lambda m: len(m.strategy)),
    Rule("max_strategy_args", "strategy_args", "options", lambda m: len(m.strategy_args)),
    Rule("max_strategy_arg_length", "strategy_args", "characters", lambda m: _longest(m.strategy_args)),
    Rule("max_strategy_arg_length", "strategy_args", "characters", lambda m: _longest(m.strategy_args.values())),
    Rule("max_salt_length", "cache_salt", "characters", lambda m: len(m.kv.cache_salt)),
    Rule("max_token_ids", "token_ids", "tokens", lambda m: len(m.token_ids.ids)),
    Rule("max_turns", "chat.messages", "turns", lambda m: len(m.chat.messages)),
    Rule("max_role_length", "chat.messages.role", "characters", lambda m: _longest(t.role for t in m.chat.messages)),
    Rule("max_stop_strings", "stop_strings", "strings", lambda m: len(m.stopping.stop_strings)),
    Rule("max_stop_string_length", "stop_strings", "characters", lambda m: _longest(m.stopping.stop_strings)),
    Rule("max_stop_characters", "stop_strings", "characters in all", lambda m: sum(map(len, m.stopping.stop_strings))),
    Rule("max_stop_token_ids", "stop_token_ids", "tokens", lambda m: len(m.stopping.stop_token_ids)),
    Rule("max_logit_bias", "logit_bias", "tokens", lambda m: len(m.decoding.logit_bias)),
    Rule("max_allowed_token_ids", "allowed_token_ids", "tokens", lambda m: len(m.decoding.allowed_token_ids)),
)
ABORT = (
    Rule("max_abort_ids", "request_ids", "ids", lambda m: len(m.request_ids)),
    Rule("max_id_length", "request_ids", "characters", lambda m: _longest(m.request_ids)),
)
UNBOUNDED = {"GenerateRequest.text", "ChatMessage.content"}
"""Strings that only the size of the message bounds here: the model's context does, with their truncation."""
RULES: dict[type[Any], tuple[Rule, ...]] = {pb.GenerateRequest: GENERATE, pb.AbortRequest: ABORT}


def check(message: Any, limits: Limits) -> None:
    """Refuse a message whose content exceeds a limit, with the field, the limit and the value."""
    for rule in RULES.get(type(message), ()):
        most, value = getattr(limits, rule.limit), rule.measure(message)
        if value > most:
            raise InvalidRequest(rule.field, f"at most {most} {rule.unit} ({rule.limit}), got {value}")
