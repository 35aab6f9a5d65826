"""Real text for demos and measurements: CPython's own documentation, which every Python carries."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence

from keysift.engine.model.tokenizer import Tokenizer

TOPICS = pydoc_data.topics.topics


def text(first: Sequence[str] = (), last: Sequence[str] = ()) -> str:
    """All topics: `first`, then the others in alphabetical order, then `last`."""
    middle = [name for name in sorted(TOPICS) if name not in {*first, *last}]
    return "\n\n".join(TOPICS[name] for name in (*first, *middle, *last))


def tokens(tokenizer: Tokenizer, length: int) -> list[int]:
    """The first `length` tokens of the documentation."""
    return tokenizer.encode(text()[: 8 * length])[:length]
