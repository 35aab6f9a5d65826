"""Likelihood of given tokens under a strategy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from keysift.attention import Strategy

from .evaluation.reader import Reader, Reading

SLICE = 256
"""Tokens that are scored at once: their logits take that many times the vocabulary."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Log-likelihood of some tokens, each after those before it; likelihoods of consecutive parts add up."""

    total: float = 0.0
    """Sum of the logs of their probabilities, in nats."""
    greedy: bool = True
    """Each token is the likeliest one at its place."""

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.total + other.total, self.greedy and other.greedy)


def continuations(
    reader: Reader, strategy: Strategy, context: Sequence[int], followers: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """Likelihood of each of `followers`, none of them empty, directly after the context.

    The context is prefilled once; the followers are decoded, as if the model had generated them.
    """
    room = max(len(tokens) for tokens in followers) - 1
    with reader.open([context], strategy, room) as (reading,):
        reader.read(reading)
        mark, found = reading.mark(), []
        for tokens in followers:
            found.append(_decoded(reader, reading, tokens))
            reader.rewind(reading, mark)
    return found


def _decoded(reader: Reader, reading: Reading, tokens: Sequence[int]) -> Likelihood:
    """Likelihood of tokens after a reading; the last one is scored without being decoded."""
    found = Likelihood()
    for part in _slices(tokens[:-1]):
        found += score(reader.follow(reading, part), part)
    return found + score(reading.next_logits[None], tokens[-1:])


def _slices(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    return (tokens[start : start + SLICE] for start in range(0, len(tokens), SLICE))


def prompt(reader: Reader, strategy: Strategy, tokens: Sequence[int], first: int) -> Likelihood:
    """Likelihood of ``tokens[first:]``, 1 <= first < len(tokens), with all tokens prefilled as one prompt."""
    found = Likelihood()

    def add(position: int, logits: Tensor) -> None:
        nonlocal found
        found += score(logits[None], tokens[position + 1 : position + 2])

    with reader.open([tokens[:-1]], strategy, 0) as (reading,):
        reader.read(reading, range(first - 1, len(tokens) - 1), add)
    return found


def score(logits: Tensor, tokens: Sequence[int]) -> Likelihood:
    """Likelihood of tokens [n] by the logits [n, V] that predicted them."""
    chosen = logits.new_tensor(tokens).long()[:, None]
    logs = logits.log_softmax(-1).gather(-1, chosen)
    greedy = logits.argmax(-1, keepdim=True) == chosen
    return Likelihood(float(logs.double().sum()), bool(greedy.all()))
