"""Tenants: callers told apart by their bearer tokens, each with limits of its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, field_validator

from keysift.engine.checked import Checked
from keysift.engine.errors import InvalidRequest

LEAST, GREATEST = -(2**31), 2**31 - 1
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
SETTING = re.compile(r"(streams|queue|priority)=")
MAX_FILE_BYTES = 2**20


class Tenant(Checked):
    """One caller. Names are its label in metrics and its part of request ids and cache salts."""

    name: str = ""
    streams: int | None = Field(None, ge=1)
    """Most open calls; None: those of all."""
    queue: int | None = Field(None, ge=1)
    """Most requests that run or wait; None: those of all."""
    priority: tuple[int, int] = (LEAST, GREATEST)
    """Least and greatest priority."""

    @field_validator("priority", mode="before")
    @classmethod
    def _range(cls, value: object) -> object:
        """`0..10` as `(0, 10)`."""
        if not isinstance(value, str):
            return value
        ends = re.fullmatch(r"(-?\d{1,10})\.\.(-?\d{1,10})", value)
        if not ends or not LEAST <= int(ends[1]) <= int(ends[2]) <= GREATEST:
            raise InvalidRequest("priority", f"LEAST..GREATEST, such as 0..10, got {value!a}")
        return int(ends[1]), int(ends[2])

    @property
    def label(self) -> str:
        return self.name or "default"

    def internal(self, request_id: str) -> str:
        """Id of a request in the engine: ids of two tenants never meet, as a name has no slash."""
        return f"{self.name}/{request_id}" if self.name else request_id

    def external(self, internal: str) -> str:
        """Id of a request as its caller knows it."""
        return internal.removeprefix(f"{self.name}/") if self.name else internal

    def salt(self, cache_salt: str) -> str:
        """Salt of the prefix cache: what one tenant caches, no other one finds."""
        return f"{self.name}/{cache_salt}" if self.name else cache_salt

    def check_priority(self, priority: int) -> None:
        least, greatest = self.priority
        if not least <= priority <= greatest:
            raise InvalidRequest("priority", f"{least} to {greatest} with this token, got {priority}")


ANYONE = Tenant()
"""The one caller of a server without names."""
NAMED_PRIORITY = (0, GREATEST)
"""Priorities of a named tenant whose line states none: nobody overtakes the others unless the operator says so."""
CURRENT: ContextVar[Tenant] = ContextVar("tenant", default=ANYONE)
"""Tenant of the call that a handler answers."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of all tenants, as hashes."""

    tenants: dict[bytes, Tenant]

    def find(self, token: bytes) -> Tenant | None:
        """Tenant of a token. How long that takes tells of the hash at most, which tells nothing of a token."""
        return self.tenants.get(_digest(token))

    @property
    def named(self) -> bool:
        """Tenants have names, and not all callers one token."""
        return ANYONE not in self.tenants.values()


def single(token: str) -> Tokens:
    """Tokens of `--api-key`. Raises `InvalidRequest` for one that no call could carry."""
    if problem := _unusable(token):
        raise InvalidRequest("api_key", problem)
    return Tokens({_digest(token.encode()): ANYONE})


class TokenFile:
    """Tokens of a file that is read again and again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._named = False

    def __call__(self) -> Tokens:
        """Tokens as `read_tokens` reads them, but no name alone for one: the file may still be being written."""
        tokens = read_tokens(self._path)
        if self._named and not tokens.named:
            raise _fault(
                self._path, "lines NAME TOKEN as before, got one word; start the server anew for a token of all"
            )
        self._named = tokens.named
        return tokens


def read_tokens(path: Path) -> Tokens:
    """Tokens of a file. Raises `InvalidRequest` naming file, line and fault, but no token."""
    lines = list(_lines(path))
    if not lines:
        raise _fault(path, "a file with a token, got an empty one")
    if len(lines) == 1 and len(lines[0][1]) == 1:
        number, [token] = lines[0]
        return Tokens({_digest(_usable(path, number, token)): ANYONE})
    tenants = [(number, *_tenant(path, number, words)) for number, words in lines]
    _refuse_twins(path, tenants)
    return Tokens({digest: tenant for _, digest, tenant in tenants})


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and words of each line that is neither empty nor a comment."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _fault(path, f"at most {MAX_FILE_BYTES} bytes, got {path.stat().st_size}")
        text = path.read_bytes().decode()
    except OSError as error:
        raise _fault(path, f"a readable file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise _fault(path, f"text, got other bytes at byte {error.start}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if (words := line.split()) and not words[0].startswith("#"):
            yield number, words


def _tenant(path: Path, number: int, words: list[str]) -> tuple[bytes, Tenant]:
    """Hash of a line's token, and its tenant."""
    if len(words) < 2:
        raise _fault(path, f"line {number}: NAME TOKEN, got one word; only a file of one line may have the token alone")
    name, token, *settings = words
    if not NAME.fullmatch(name):
        raise _fault(path, f"line {number}: a name of 1 to 64 letters, digits, '_', '.' and '-'")
    pairs = [setting.partition("=") for setting in settings]
    known = set(Tenant.model_fields) - {"name"}
    if any(key not in known or not equals for key, equals, _ in pairs):
        raise _fault(path, f"line {number}: after name and token only {', '.join(sorted(known))}, each with =VALUE")
    try:
        tenant = Tenant(name=name, **{"priority": NAMED_PRIORITY} | {key: value for key, _, value in pairs})
    except InvalidRequest as error:
        raise _fault(path, f"line {number}: {error}") from None
    return _digest(_usable(path, number, token)), tenant


def _refuse_twins(path: Path, tenants: Iterable[tuple[int, bytes, Tenant]]) -> None:
    names: dict[str, int] = {}
    digests: dict[bytes, int] = {}
    for number, digest, tenant in tenants:
        if (first := names.setdefault(tenant.name, number)) != number:
            raise _fault(path, f"line {number}: the name {tenant.name!r} is that of line {first}")
        if (first := digests.setdefault(digest, number)) != number:
            raise _fault(path, f"line {number}: the token is that of line {first}")


def _usable(path: Path, number: int, token: str) -> bytes:
    if problem := _unusable(token):
        raise _fault(path, f"line {number}: {problem}")
    return token.encode()


def _unusable(token: str) -> str:
    """Problem of a token that a call could not carry; empty: none."""
    if SETTING.match(token):
        return "a token, got a setting in its place"
    if token and token.isascii() and token.isprintable() and token == token.strip():
        return ""
    return "a token of printable ASCII characters, got an empty one or others"


def _fault(path: Path, problem: str) -> InvalidRequest:
    return InvalidRequest("api_key_file", f"{str(path)!r}: {problem}")


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
