"""How likely a model finds a given text, under whatever strategy reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from keysift.attention import Strategy

from .evaluation.reader import Reader, Reading

SLICE = 256
"""Tokens that are judged at once: their logits are as many times the vocabulary."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of some tokens, each behind those before it. Add them up for the tokens together."""

    total: float = 0.0
    """The sum of the logs of their probabilities, in nats."""
    greedy: bool = True
    """Each of them is the likeliest one at its place."""

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.total + other.total, self.greedy and other.greedy)


def continuations(
    reader: Reader, strategy: Strategy, context: Sequence[int], followers: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """Of each of `followers`, none of them empty, right behind the context.

    The context is read once, as a prompt; what follows it is decoded, as if the model had said it.
    """
    room = max(len(tokens) for tokens in followers) - 1
    with reader.open([context], strategy, room) as (reading,):
        reader.read(reading)
        ahead, found = reading.ahead, []
        for tokens in followers:
            found.append(_decoded(reader, reading, tokens))
            reader.forget(reading, ahead)
    return found


def _decoded(reader: Reader, reading: Reading, tokens: Sequence[int]) -> Likelihood:
    """The last token need not be decoded: nothing is asked about what comes behind it."""
    found = Likelihood()
    for part in _slices(tokens[:-1]):
        found += judge(reader.follow(reading, part), part)
    return found + judge(reading.ahead[None], tokens[-1:])


def _slices(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    return (tokens[start : start + SLICE] for start in range(0, len(tokens), SLICE))


def prompt(reader: Reader, strategy: Strategy, tokens: Sequence[int], first: int) -> Likelihood:
    """Of ``tokens[first:]``, 1 <= first < len(tokens), with all tokens read as one prompt."""
    found = Likelihood()

    def hear(position: int, logits: Tensor) -> None:
        nonlocal found
        found += judge(logits[None], tokens[position + 1 : position + 2])

    with reader.open([tokens[:-1]], strategy, 0) as (reading,):
        reader.read(reading, range(first - 1, len(tokens) - 1), hear)
    return found


def judge(logits: Tensor, tokens: Sequence[int]) -> Likelihood:
    """Of tokens [n], by the logits [n, V] that predicted them."""
    chosen = logits.new_tensor(tokens).long()[:, None]
    logs = logits.log_softmax(-1).gather(-1, chosen)
    greedy = logits.argmax(-1, keepdim=True) == chosen
    return Likelihood(float(logs.double().sum()), bool(greedy.all()))
