"""Texts to compare distributions along: CPython's documentation and the user's files."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InvalidRequest
from ...model.tokenizer import Tokenizer

DOCUMENTATION = "documentation"


@dataclass(frozen=True, slots=True)
class Text:
    """A tokenized text."""

    name: str
    tokens: tuple[int, ...]


def documentation() -> str:
    """All topics of CPython's help, part of every Python."""
    return "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))


def texts(files: Sequence[Path], longest: int, tokenizer: Tokenizer) -> list[Text]:
    """The first `longest` tokens of the documentation and of each file.

    The documentation is left out if it is shorter and there are files.

    Raises:
        InvalidRequest: a file cannot be read, is shorter, or has the name of another one.
    """
    names = [DOCUMENTATION, *(path.name for path in files)]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest("texts", f"files of different names, none of them {DOCUMENTATION!r}, got {double!r} twice")
    given = [_text(path.name, _read(path), longest, tokenizer) for path in files]
    try:
        return [_text(DOCUMENTATION, documentation(), longest, tokenizer), *given]
    except InvalidRequest:
        if given:
            return given
        raise


def _text(name: str, content: str, longest: int, tokenizer: Tokenizer) -> Text:
    tokens = tokenizer.encode(content[: 16 * longest])[:longest]
    if len(tokens) < longest:
        raise InvalidRequest(
            "texts",
            f"{name} has {len(tokens)} tokens, the longest of the lengths is {longest}; name a longer text, or do "
            "without (--no-agreement)",
        )
    return Text(name, tuple(tokens))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("texts", f"readable text files in UTF-8, got {str(path)!r} ({error})") from None
