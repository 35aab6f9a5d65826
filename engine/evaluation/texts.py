"""Real texts to follow: CPython's documentation, and files of one's own."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidRequest
from ..tokenizer import Tokenizer

DOCUMENTATION = "documentation"


@dataclass(frozen=True, slots=True)
class Text:
    """A text in tokens."""

    name: str
    tokens: tuple[int, ...]


def documentation() -> str:
    """All topics of CPython's help, which every Python carries."""
    return "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))


def texts(files: Sequence[Path], longest: int, tokenizer: Tokenizer) -> list[Text]:
    """The first `longest` tokens of the documentation and of each file.

    Raises `InvalidRequest` for a file that cannot be read or is shorter.
    """
    sources = {DOCUMENTATION: documentation(), **{path.name: _read(path) for path in files}}
    return [_text(name, content, longest, tokenizer) for name, content in sources.items()]


def _text(name: str, content: str, longest: int, tokenizer: Tokenizer) -> Text:
    tokens = tokenizer.encode(content[: 16 * longest])[:longest]
    if len(tokens) < longest:
        raise InvalidRequest("texts", f"{name} has {len(tokens)} tokens, the longest of the lengths is {longest}")
    return Text(name, tuple(tokens))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("texts", f"readable text files in UTF-8, got {str(path)!r} ({error})") from None
