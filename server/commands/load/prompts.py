"""Prompts of a load run: cut from real text to a length in tokens, or read from a file."""

from __future__ import annotations

import json
import math
import random
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keysift.engine.errors import InvalidRequest
from keysift.engine.measure.evaluation.texts import documentation
from keysift.engine.request import PromptInfo, SamplingParams

from ...client import Client
from ...options import Prompt

SAMPLE_CHARACTERS = 8192
"""Length of the text from which the characters of a token are estimated."""
MARGIN = 1.5
"""Factor on the characters that a prompt should need: some parts of a text have longer words than others."""


@dataclass(frozen=True, slots=True)
class SizedPrompt:
    """Prompt of one request, and the length that the server truncates it to."""

    prompt: Prompt
    length: int | None = None
    """Tokens that are kept, from the end; None: all."""


def cut(lengths: Iterable[int], seed: int, token_size: float) -> list[SizedPrompt]:
    """One prompt for each length in tokens, from random offsets in CPython's documentation.

    `token_size` is the mean number of characters in a token. The text is longer than needed; the server, which has the
    tokenizer, truncates it to the exact length.
    """
    text, draw = documentation(), random.Random(seed)
    sized = []
    for length in lengths:
        size = math.ceil(MARGIN * token_size * length) + 64
        sized.append(SizedPrompt(_wrap(text, draw.randrange(len(text)), size), length))
    return sized


def _wrap(text: str, start: int, size: int) -> str:
    """`size` characters from `start` on, of the text repeated without end."""
    turns = -(-(start + size) // len(text))
    return (text * turns)[start : start + size]


def token_size(client: Client, max_model_len: int, priority: int = 0) -> float:
    """Mean characters of a token, from the server's token count of one sample; the request is aborted then."""
    # A token has at least one character of this text, so that the sample fits with every tokenizer.
    sample = documentation()[: max(1, min(SAMPLE_CHARACTERS, max_model_len - 2))]
    name, size = uuid.uuid4().hex, 0.0
    once = SamplingParams(max_new_tokens=1)
    outputs = client.generate(sample, once, request_id=name, bypass_prefix_cache=True, priority=priority)
    for output in outputs:  # to the end: a cancelled one would keep its place in the queue for a while
        if isinstance(output, PromptInfo):
            size = len(sample) / output.prompt_tokens
            client.abort([name])
    if not size:
        raise InvalidRequest("address", "a server that reports prompt_info, got none")
    return size


def read(file: Path) -> list[SizedPrompt]:
    """Prompts of a JSONL file, one for each line that is not blank."""
    found = list(_lines(file))
    if not found:
        raise InvalidRequest("prompts", f"a prompt in each line, got none in {str(file)!r}")
    return found


def _lines(file: Path) -> Iterator[SizedPrompt]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("prompts", f"a readable text file, got {str(file)!r} ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield SizedPrompt(_prompt(line, f"line {number} of {str(file)!r}"))


def _prompt(line: str, where: str) -> Prompt:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise InvalidRequest("prompts", f"a JSON object in each line, got {where} ({error})") from None
    found = (value.get("prompt") or value.get("messages")) if isinstance(value, Mapping) else None
    if not found or not isinstance(found, str | list):
        raise InvalidRequest("prompts", f"an object with prompt or messages in each line, got {where}")
    return found
