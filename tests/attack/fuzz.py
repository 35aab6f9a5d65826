"""Random messages, made from the descriptors of the contract."""

from __future__ import annotations

from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def fill(message: Message, dice: Random, depth: int = 0) -> None:
    """Set random fields to random values of their type."""
    for field in message.DESCRIPTOR.fields:
        if dice.random() > (0.25 if depth == 0 else 0.4):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _fill_map(message, field, dice)
        elif field.is_repeated:
            _fill_list(message, field, dice, depth)
        elif field.message_type is not None:
            fill(getattr(message, field.name), dice, depth + 1)
        else:
            setattr(message, field.name, _scalar(field, dice))


def _fill_map(message: Message, field: FieldDescriptor, dice: Random) -> None:
    key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    for _ in range(dice.randint(0, 3)):
        getattr(message, field.name)[_scalar(key, dice)] = _scalar(value, dice)


def _fill_list(message: Message, field: FieldDescriptor, dice: Random, depth: int) -> None:
    for _ in range(dice.randint(0, 4)):
        if field.message_type is not None:
            fill(getattr(message, field.name).add(), dice, depth + 1)
        else:
            getattr(message, field.name).append(_scalar(field, dice))


def _scalar(field: FieldDescriptor, dice: Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return dice.choice(["", "a", "user", "dense", "\x00", "😀" * 9, "x" * 300, "1", "\u202e", "%s{}"])
        case FieldDescriptor.CPPTYPE_BOOL:
            return dice.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return dice.choice([0.0, 1.0, 0.5, -1.0, 5e-324, 1e308, float("nan"), float("inf"), dice.random()])
        case FieldDescriptor.CPPTYPE_INT32:
            return dice.choice([0, 1, -1, 2**31 - 1, -(2**31)])
        case FieldDescriptor.CPPTYPE_UINT64:
            return dice.choice([0, 1, 2**63, 2**64 - 1])
        case _:
            return dice.choice([0, 1, 2, 17, 258, 259, 2**31, 2**32 - 1])


def varint(value: int) -> bytes:
    """A length as protobuf writes it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
