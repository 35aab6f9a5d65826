"""Samples of a task with an exact number of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from ....errors import InvalidRequest
from ..sample import Sample
from .pieces import Pieces, Tokens, TooShort
from .registry import Task, find

if TYPE_CHECKING:
    from ....model.tokenizer import Tokenizer

STEP = 32
"""Tokens between the lengths that are tried to find the least possible one."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Tokens and text around a prompt: the model's chat template, or only the tokens that begin a text."""

    opening: Tokens
    closing: str
    chat: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, pieces: Pieces, chat: bool) -> Frame:
        around = tokenizer.around() if chat else None
        if around is None:
            return cls(pieces.opening(), "", False)
        return cls(pieces.alone(around[0]), around[1], True)

    def ending(self, question: str, prefix: str) -> str:
        """The end of the prompt: after a template the answer begins a text; after a template's bracket, a word."""
        if self.chat:
            prefix = prefix.lstrip("\n" if self.closing.endswith("]") else None)
        return question + self.closing + prefix


def make(
    task: Task | str, tokenizer: Tokenizer, length: int, index: int = 0, seed: int = 0, chat: bool = True
) -> Sample:
    """Sample number `index` of a task: prompt and room for the answer are exactly `length` tokens.

    The same arguments give the same tokens everywhere, except for prose, which comes from the running Python. `chat`
    puts the prompt into the model's template if it has one. Raises `InvalidRequest` if `length` is too short.
    """
    task = find([task])[0] if isinstance(task, str) else task
    try:
        return _made(task, tokenizer, length, index, seed, chat)
    except TooShort:
        least = _least(task, tokenizer, length, index, seed, chat)
        raise InvalidRequest("lengths", f"{task.name} takes {least} tokens or more here, got {length}") from None


def dice_of(task: str, length: int, index: int, seed: int) -> Random:
    """Random generator of one sample, independent of other samples."""
    digest = hashlib.sha256(f"{seed}/{task}/{length}/{index}".encode()).digest()
    return Random(int.from_bytes(digest, "big"))


def _made(task: Task, tokenizer: Tokenizer, length: int, index: int, seed: int, chat: bool) -> Sample:
    pieces = Pieces(tokenizer)
    puzzle = task.build(dice_of(task.name, length, index, seed), pieces)
    frame = Frame.of(tokenizer, pieces, chat)
    ending = frame.ending(puzzle.question, puzzle.prefix)
    closing = pieces(ending, "." if ending.startswith("\n") else "\n")
    context = puzzle.context(length - task.max_new_tokens - len(frame.opening) - len(closing))
    return Sample(
        task.name,
        length,
        index,
        (*frame.opening, *context, *closing),
        puzzle.answers,
        tuple(pieces(puzzle.gold, ending)),
        task.max_new_tokens,
        puzzle.match,
    )


def _least(task: Task, tokenizer: Tokenizer, length: int, index: int, seed: int, chat: bool) -> int:
    """The next length, in steps, at which this sample can be made."""
    tried = max(length, 0) // STEP * STEP + STEP
    while True:
        try:
            return _made(task, tokenizer, tried, index, seed, chat).length
        except TooShort:
            tried += STEP
