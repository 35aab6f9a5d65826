"""Units of work of an evaluation, each run under every strategy, dense first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from keysift.attention import Strategy

from ..variants import DENSE
from .along import DECODED, Along
from .answers import Interview
from .journal import Key
from .reader import Reader
from .sample import Sample

Finding = tuple[Key, Any]
"""Key and value of a journal entry."""


class Unit(Protocol):
    """One unit of work."""

    @property
    def title(self) -> str: ...

    @property
    def cost(self) -> int:
        """Tokens to read for each strategy."""

    def key(self, label: str) -> Key:
        """Journal key of the finding about one strategy."""

    def run(self, reader: Reader, strategies: Mapping[str, Strategy]) -> Iterator[Finding]:
        """Findings about these strategies, `dense` first among them."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Samples of one length."""

    group: str
    length: int
    index: int
    samples: tuple[Sample, ...]

    @property
    def title(self) -> str:
        return f"{len(self.samples)} questions of {self.length:,} tokens"

    @property
    def cost(self) -> int:
        return sum(len(sample.prompt) for sample in self.samples)

    def key(self, label: str) -> Key:
        return "samples", self.group, self.length, self.index, label

    def run(self, reader: Reader, strategies: Mapping[str, Strategy]) -> Iterator[Finding]:
        interview = Interview(reader, list(self.samples))
        dense = interview.ask(strategies[DENSE])
        for label, strategy in strategies.items():
            answers = dense if label == DENSE else interview.ask(strategy)
            yield self.key(label), [answer.row(exact) for answer, exact in zip(answers, dense, strict=True)]


@dataclass(frozen=True, slots=True)
class Prompts:
    """A text as a sparse prompt."""

    name: str
    tokens: tuple[int, ...]

    @property
    def title(self) -> str:
        return f"{self.name}, {len(self.tokens):,} tokens as a prompt"

    @property
    def cost(self) -> int:
        return len(self.tokens)

    def key(self, label: str) -> Key:
        return "text", "prefill", self.name, len(self.tokens), label

    def run(self, reader: Reader, strategies: Mapping[str, Strategy]) -> Iterator[Finding]:
        for label, found in Along(reader, list(self.tokens)).prompt(strategies):
            yield self.key(label), found


@dataclass(frozen=True, slots=True)
class Tokens(Prompts):
    """The end of a text, decoded after a dense prompt."""

    @property
    def title(self) -> str:
        return f"{self.name}, {DECODED} tokens after {len(self.tokens) - DECODED:,}"

    @property
    def cost(self) -> int:
        return len(self.tokens) // 4  # the prompt is read once for all strategies

    def key(self, label: str) -> Key:
        return "text", "decode", self.name, len(self.tokens), label

    def run(self, reader: Reader, strategies: Mapping[str, Strategy]) -> Iterator[Finding]:
        for label, found in Along(reader, list(self.tokens)).decoded(strategies):
            yield self.key(label), found
