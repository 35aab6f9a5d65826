"""Control tokens in what messages say, spelled as plain text, so that no message forges a turn."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from ..errors import InvalidRequest, shortened

NAME = re.compile(r"[\w .:/-]*")
"""Roles and names. Templates write them within control tokens, so no part of such a token belongs there."""
BARS = re.compile(r"<[|｜].*[|｜]>")
"""Spelling of tokens that separate turns, for templates that put them together from parts."""
ASSISTANT = "assistant"
CUT = -1
"""Number of the mark that leaves no token."""

Place = tuple[int, int, int]
"""Token id, first character and last + 1."""


def check_text(text: str) -> None:
    """Raises `InvalidRequest` for a text that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise InvalidRequest("prompt", f"text without lone surrogates, got {wrong}") from None


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation in a model's template."""

    text: str
    quoted: Mapping[str, str]
    """Stand-ins in the text for control tokens that messages spell, and what they stand for."""

    def last(self, characters: int) -> Written:
        """The end of the conversation."""
        return Written(self.text[-characters:], self.quoted)


class Quoting:
    """Finds control tokens in messages, and makes tokens of a conversation in which those are plain text.

    Control tokens are the special ones and others that the template writes. In the assistant's turns only special ones
    count: by the others a model marks its own thoughts and calls. Immutable, so that threads can share it.
    """

    def __init__(self, backend: Tokenizer, template: str, unknown: int | None) -> None:
        """`unknown` is the token for text that the vocabulary cannot spell; it may be anywhere in plain text."""
        added = backend.get_added_tokens_decoder()
        visible = {number: token for number, token in added.items() if token.content.strip()}
        self._special = frozenset(number for number, token in visible.items() if token.special)
        self._control = self._special | {
            number for number, token in visible.items() if token.content in template or BARS.fullmatch(token.content)
        }
        self._plain = frozenset({unknown})
        self._secret = f"{secrets.randbelow(10**20):020}"  # digits, which no filter of a template changes
        self._stand_in = re.compile(rf"{self._secret}\d{{9}}")
        self._scanner = _scanner(backend, self._secret)
        self._ids = {self._scanner.token_to_id(token.content): number for number, token in added.items()}
        secret = secrets.token_hex(10)
        self._marks = {number: f"{secret}x{number}x" for number in (*added, CUT)}
        self._speller = _speller(backend, list(self._marks.values()))
        self._marked = {self._speller.token_to_id(mark): number for number, mark in self._marks.items()}

    def quote(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The messages with a stand-in for each control token, and what the stand-ins stand for.

        Raises `InvalidRequest` for a role or a name with characters that none has.
        """
        for message in messages:
            _check_names(message)
        texts = list(dict.fromkeys(text for message in messages for text in _texts(message)))
        for text in texts:
            check_text(text)
        found = {text: places for text, places in zip(texts, self._scan(texts), strict=True) if places}
        stand_ins: dict[str, str] = {}
        quoted = []
        for message in messages:
            control = self._special if message.get("role") == ASSISTANT else self._control
            quoted.append(_changed(message, partial(self._replace, found, control, stand_ins)))
        return quoted, {stand_in: text for text, stand_in in stand_ins.items()}

    def tokens(self, written: Written) -> list[int]:
        """Tokens of a conversation. Raises `InvalidRequest` where a control token in a message cannot be spelled."""
        quoted = {place[0] for places in self._scan(list(written.quoted.values())) for place in places}
        for cut in ("", self._marks[CUT]):
            ids = self._encode(written, cut)
            plain = {number for number in ids if number not in self._marked}
            if plain.isdisjoint(quoted - self._plain):
                known = (self._marked.get(number, number) for number in ids)
                return [number for number in known if number != CUT]
        shown = shortened(sorted(set(written.quoted.values())))
        raise InvalidRequest("chat", f"contents without tokens that cannot be spelled as plain text, got {shown}")

    def _replace(
        self, found: Mapping[str, list[Place]], control: Set[int], stand_ins: dict[str, str], text: str
    ) -> str:
        """The text with stand-ins, new ones of which are added to `stand_ins`."""
        places = [place for place in found.get(text, ()) if place[0] in control]
        return _exchanged(text, places, lambda place: self._stood_in(text[place[1] : place[2]], stand_ins))

    def _stood_in(self, part: str, stand_ins: dict[str, str]) -> str:
        """A stand-in for a control token, between the spaces that the token takes with it."""
        token = part.strip()
        return part.replace(token, stand_ins.setdefault(token, f"{self._secret}{len(stand_ins):09}"))

    def _encode(self, written: Written, cut: str) -> list[int]:
        """The speller's tokens, with `cut` after the first character of what is quoted.

        The template's own tokens become marks, the stand-ins plain text, which has no meaning to the speller.
        """
        (places,) = self._scan([written.text])
        marked = _exchanged(written.text, places, lambda place: self._marks[place[0]])

        def spelled(stand_in: re.Match[str]) -> str:
            text = written.quoted.get(stand_in[0], stand_in[0])
            return text[:1] + cut + text[1:]

        text = self._stand_in.sub(spelled, marked)
        if self._secret in text:
            raise InvalidRequest("chat", "contents that the model's template leaves whole, got part of a control token")
        return list(self._speller.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _scan(self, texts: Sequence[str]) -> list[list[Place]]:
        """Places of added tokens in each text, as the tokenizer finds them."""
        encodings = self._scanner.encode_batch(texts, add_special_tokens=False)
        return [
            [
                (self._ids[number], *place)
                for number, place in zip(encoding.ids, encoding.offsets, strict=True)
                if number in self._ids
            ]
            for encoding in encodings
        ]


def _scanner(backend: Tokenizer, other: str) -> Tokenizer:
    """Tokenizer that finds the added tokens of `backend`, and makes one token of all between two of them."""
    scanner = Tokenizer(models.WordLevel(vocab={other: 0}, unk_token=other))
    added = list(backend.get_added_tokens_decoder().values())
    if backend.normalizer is not None and any(token.normalized for token in added):
        scanner.normalizer = backend.normalizer
    scanner.add_tokens(added)
    return scanner


def _speller(backend: Tokenizer, marks: list[str]) -> Tokenizer:
    """Tokenizer of the same model that knows `marks` in place of the added tokens."""
    speller = Tokenizer(backend.model)
    if backend.normalizer is not None:
        speller.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        speller.pre_tokenizer = backend.pre_tokenizer
    speller.add_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    return speller


def _exchanged(text: str, places: Sequence[Place], new: Callable[[Place], str]) -> str:
    """The text with something else at each of the places, which are in order."""
    if not places:
        return text
    between = pairwise([0, *(border for _, *place in places for border in place), len(text)])
    parts = [text[start:end] for start, end in between]
    parts[1::2] = [new(place) for place in places]
    return "".join(parts)


def _check_names(message: Mapping[str, Any]) -> None:
    for field in ("role", "name"):
        value = message.get(field)
        if isinstance(value, str) and not NAME.fullmatch(value):
            problem = f"a {field} of letters, digits, spaces and any of _ - . : /, got {shortened(value)}"
            raise InvalidRequest("chat", problem)


def _texts(value: Any) -> Iterator[str]:
    """All texts within a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in (*value.keys(), *value.values()):
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A message with all texts within it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(part, change) for part in value]
    return value
