"""Parsing of messages: the fields on the wire are counted before the parser allocates for them."""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from keysift.engine.errors import InvalidRequest

from .limits import Limits, check

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types. Those of groups, which this version of the language does not have, are refused."""
TEXT, MESSAGE = FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE
CONTINUED = bytes(range(128, 256))
"""Bytes of a varint that another one follows."""


class Malformed(InvalidRequest):
    """The bytes are no message of their kind."""


def parse(kind: Any, body: bytes, limits: Limits) -> Any:
    """Message of a body, within the limits of its content. Raises `InvalidRequest`, and `Malformed` for other bytes.

    A parser takes up to 30 bytes of memory for a byte of the wire, in one piece of work that stops all other threads:
    two bytes are an empty turn of a chat, one byte is a token.
    """
    try:
        _count(body, kind.DESCRIPTOR, limits)
        message = kind.FromString(body)
    except (DecodeError, IndexError, UnicodeDecodeError):
        raise Malformed("message", f"a {kind.DESCRIPTOR.full_name}, got {len(body)} bytes that are none") from None
    check(message, limits)
    return message


def _count(body: bytes, descriptor: Descriptor, limits: Limits) -> None:
    """Refuse a body with more than `max_fields` fields, or more than `max_token_ids` numbers in its packed lists."""
    fields, numbers = 0, 0
    spans = [(descriptor, 0, len(body))]
    while spans:
        descriptor, at, end = spans.pop()
        messages, lists = _nested(descriptor)
        while at < end:
            fields += 1
            if fields > limits.max_fields:
                raise InvalidRequest("message", f"at most {limits.max_fields} fields (max_fields), got more")
            tag, at = _varint(body, at)
            number, size, at = tag >> 3, *_size(body, at, tag & 7)
            if tag & 7 == BYTES and number in messages:
                spans.append((messages[number], at, at + size))
            elif tag & 7 == BYTES and number in lists:
                numbers += len(body[at : at + size].translate(None, CONTINUED))
                if numbers > limits.max_token_ids:
                    raise InvalidRequest(
                        "token_ids", f"at most {limits.max_token_ids} tokens (max_token_ids), got {numbers}"
                    )
            at += size
        if at > end:
            raise DecodeError


def _size(body: bytes, at: int, wire: int) -> tuple[int, int]:
    """Bytes of a field's value, and where it begins."""
    match wire:
        case 0:  # VARINT
            return _varint(body, at)[1] - at, at
        case 1:
            return 8, at
        case 2:
            return _varint(body, at)
        case 5:
            return 4, at
    raise DecodeError


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """Number at a place, and the place after it."""
    byte = body[at]
    if byte < 128:
        return byte, at + 1
    value, shift = byte & 127, 7
    while byte >= 128:
        at += 1
        if shift > 63:
            raise DecodeError
        byte = body[at]
        value |= (byte & 127) << shift
        shift += 7
    return value, at + 1


@cache
def _nested(descriptor: Descriptor) -> tuple[dict[int, Descriptor], set[int]]:
    """Fields by number: those that are messages, and those that may be lists of numbers."""
    messages = {field.number: field.message_type for field in descriptor.fields if field.message_type}
    return messages, {field.number for field in descriptor.fields if field.cpp_type not in (TEXT, MESSAGE)}
