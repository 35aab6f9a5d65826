"""Prompts for a load run: cut from real text to a length in tokens, or read from a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keysift.engine.errors import InvalidRequest
from keysift.engine.measure.evaluation.texts import documentation
from keysift.engine.request import PromptInfo, SamplingParams

from ...client import Client
from ...options import Prompt

PROBED = 8192
"""Characters whose tokens the server is asked to count."""
SPARE = 1.5
"""So many times the characters that a prompt should need: some parts of a text have longer words than others."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request sends."""

    prompt: Prompt
    length: int | None = None
    """Of the prompt, only the last so many tokens; None: all of them."""


def cut(lengths: Iterable[int], seed: int, token_size: float) -> list[Ask]:
    """A prompt of each length in tokens, each from a place of its own in CPython's documentation.

    `token_size` is the mean number of characters in a token. The server cuts to the exact length: only it can count.
    """
    whole, places = documentation(), random.Random(seed)
    asks = []
    for length in lengths:
        size = math.ceil(SPARE * token_size * length) + 64
        start = places.randrange(len(whole))
        asks.append(Ask(_around(whole, start, size), length))
    return asks


def _around(whole: str, start: int, size: int) -> str:
    """`size` characters from `start` on; behind the end of the text comes its beginning."""
    turns = -(-(start + size) // len(whole))
    return (whole * turns)[start : start + size]


def token_size(client: Client, max_model_len: int) -> float:
    """Characters in a token of the text, a mean that the server is asked for; it reads nothing else of it."""
    # A token has at least one character of this text, so it fits whatever the tokenizer is.
    sample = documentation()[: max(1, min(PROBED, max_model_len - 2))]
    outputs = client.generate(sample, SamplingParams(max_new_tokens=1), bypass_prefix_cache=True)
    for output in outputs:
        if isinstance(output, PromptInfo):
            outputs.close()  # type: ignore[attr-defined]
            return len(sample) / output.prompt_tokens
    raise InvalidRequest("address", "the server did not say how many tokens a prompt has")


def read(file: Path) -> list[Ask]:
    """The prompts of a JSONL file, one in each line that is not blank."""
    asks = list(_lines(file))
    if not asks:
        raise InvalidRequest("prompts", f"a prompt in each line, got none in {str(file)!r}")
    return asks


def _lines(file: Path) -> Iterator[Ask]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("prompts", f"a readable text file, got {str(file)!r} ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Ask(_prompt(line, f"line {number} of {str(file)!r}"))


def _prompt(line: str, where: str) -> Prompt:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise InvalidRequest("prompts", f"a JSON object in each line, got {where} ({error})") from None
    found = (value.get("prompt") or value.get("messages")) if isinstance(value, Mapping) else None
    if not found or not isinstance(found, str | list):
        raise InvalidRequest("prompts", f"an object with prompt or messages in each line, got {where}")
    return found
