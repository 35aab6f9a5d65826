"""Parsing of messages: what is on the wire is counted before the parser allocates for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from keysift.engine.errors import InvalidRequest

from .limits import UNBOUNDED, Limits, check

VARINT, BYTES = 0, 2
FIXED = {1: 8, 5: 4}
"""Bytes of the other wire types; those of groups, which this version of the language does not have, are refused."""
CONTINUED = bytes(range(128, 256))
"""Bytes of a number that another byte follows."""
PIECE = 2**20
"""Bytes that are counted at once, as other threads stand still meanwhile."""


class Malformed(InvalidRequest):
    """The bytes are no message of their kind."""


def parse(kind: Any, body: bytes, limits: Limits) -> Any:
    """Message of a body, within the limits of its content. Raises `InvalidRequest`, and `Malformed` for other bytes.

    A parser takes up to 30 bytes of memory for a byte of the wire, in one piece of work that stops all other threads:
    two bytes are an empty turn of a chat, one byte is a token.
    """
    try:
        _Count(body, limits).add(kind.DESCRIPTOR, 0, len(body))
        message = kind.FromString(body)
    except (DecodeError, IndexError):
        raise Malformed("message", f"a {kind.DESCRIPTOR.full_name}, got {len(body)} bytes that are none") from None
    check(message, limits)
    return message


class _Count:
    """Counts of one body, which refuse too many fields, too long a string or too many numbers in its lists."""

    def __init__(self, body: bytes, limits: Limits) -> None:
        self._body, self._limits = body, limits
        self._fields = self._numbers = 0

    def add(self, descriptor: Descriptor, begin: int, end: int) -> None:
        """Count a message, with those inside it: as many levels as the contract has."""
        messages, texts, lists = _known(descriptor)
        for number, wire, at, size in _fields(self._body, begin, end):
            self._fields += 1
            if self._fields > self._limits.max_fields:
                raise InvalidRequest("message", f"at most {self._limits.max_fields} fields, got more")
            if wire != BYTES:
                continue
            if number in messages:
                self.add(messages[number], at, at + size)
            elif number in lists:
                self._add_list(at, size)
            elif size > self._limits.max_string_size and number in texts:
                raise _too_many(texts[number], "bytes", "max_string_size", self._limits, size)

    def _add_list(self, at: int, size: int) -> None:
        self._numbers += _numbers(self._body, at, size)
        if self._numbers > self._limits.max_token_ids:
            raise _too_many("token_ids", "tokens", "max_token_ids", self._limits, self._numbers)


def _too_many(field: str, unit: str, limit: str, limits: Limits, value: int) -> InvalidRequest:
    return InvalidRequest(field, f"at most {getattr(limits, limit):d} {unit} ({limit}), got {value}")


def _fields(body: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Fields of a message that is at this place: number, wire type, and the place and size of the value."""
    while at < end:
        tag, at = (body[at], at + 1) if body[at] < 128 else _varint(body, at)
        wire = tag & 7
        if wire == BYTES:
            size, at = (body[at], at + 1) if body[at] < 128 else _varint(body, at)
        elif wire == VARINT:
            size = _varint(body, at)[1] - at
        elif (size := FIXED.get(wire, 0)) == 0:
            raise DecodeError
        if at + size > end:
            raise DecodeError
        yield tag >> 3, wire, at, size
        at += size


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """Number at a place, and the place after it."""
    value = 0
    for place in range(at, at + 10):
        byte = body[place]
        value |= (byte & 127) << 7 * (place - at)
        if byte < 128:
            return value, place + 1
    raise DecodeError


def _numbers(body: bytes, at: int, size: int) -> int:
    """Numbers of a packed list."""
    pieces = (body[begin : min(begin + PIECE, at + size)] for begin in range(at, at + size, PIECE))
    return sum(len(piece.translate(None, CONTINUED)) for piece in pieces)


@cache
def _known(descriptor: Descriptor) -> tuple[dict[int, Descriptor], dict[int, str], set[int]]:
    """Fields by number: messages, strings other than a prompt's text, and those that may be lists of numbers."""
    text, message = FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE
    messages = {field.number: field.message_type for field in descriptor.fields if field.message_type}
    texts = {field.number: field.name for field in descriptor.fields if field.cpp_type == text}
    bounded = {number: name for number, name in texts.items() if f"{descriptor.name}.{name}" not in UNBOUNDED}
    return messages, bounded, {field.number for field in descriptor.fields if field.cpp_type not in (text, message)}
