"""Losses of a strategy against dense attention along a text, in fp32: next-token distributions and needles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from keysift.attention import Dense, Strategy
from keysift.engine import Engine, EngineConfig
from keysift.engine.measure.evaluation.divergence import logs
from keysift.engine.measure.evaluation.reader import Mark, Reader, Reading
from keysift.kvcache import Phase

from .texts import text

SCORED = 1500
"""Positions whose next-token distributions are compared, evenly spaced over the last three quarters."""
NEEDLES = {
    "harbour": "402917", "lantern": "731064", "meadow": "586320", "orchard": "914275",
    "compass": "268531", "thimble": "850692", "granite": "397148", "saddle": "625803",
}  # fmt: skip
NEEDLE = "\nOne of the special magic numbers for {} is: {}.\n"
QUESTION = "\n\nWhat is the special magic number for {0}?\nOne of the special magic numbers for {0} is: "
ROOM = 128
"""Tokens of a question and its answer, at most."""
Ask = Callable[[list[int], list[int]], Tensor]
"""Reads a question and its answer after the text; returns [n, V], logs of the probabilities of the answer's tokens."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Measurements of one strategy on one text."""

    logs: Tensor
    """[SCORED, V], logs of next-token probabilities."""
    answers: Tensor
    """[needles], mean negative log-likelihood of the answer's tokens in nats."""
    facts: dict[str, float | None]
    """Densities and coverages; None: not known."""

    def against(self, dense: Outcome, followers: Tensor) -> dict[str, float | None]:
        """The facts, and the distance from dense; tokens [followers] follow the first scored positions in the text."""
        lost = self.answers - dense.answers
        return {
            **self.facts,
            **divergence(dense.logs, self.logs, followers),
            "needle_nll": float(self.answers.mean()),
            "needle_loss": float(lost.mean()),
            "needle_loss_worst": float(lost.max()),
        }


@dataclass(slots=True)
class Bench:
    """A model under a `Reader`, and the dense outcomes that strategies are compared with."""

    reader: Reader
    dense: dict[tuple[str, int], Outcome] = field(default_factory=dict)

    @classmethod
    def open(cls, chunk: int, model: str | None = None) -> Bench:
        """A model, by default the embedded one, in fp32: in bf16 dense differs from itself by a KL of 0.002."""
        fields = {"dtype": "float32", "device": "cpu", "strategy": "dense", "max_num_seqs": 1, "prefix_cache": False}
        return cls(Reader(Engine(EngineConfig(model=model, prefill_chunk=chunk, **fields))))

    def compare(self, kind: str, length: int, strategy: Strategy) -> dict[str, float | None]:
        """One strategy on the first `length` tokens of a text with needles in it, against dense.

        `length` is a multiple of the row, so that questions begin with a row.
        """
        if (kind, length) not in self.dense:
            self.dense.clear()  # its distributions are 300 MB
            self.dense[kind, length] = self.read(kind, length, Dense())
        return self.read(kind, length, strategy).against(self.dense[kind, length], self.followers(kind, length))

    def read(self, kind: str, length: int, strategy: Strategy) -> Outcome:
        """Prefill the text and compare along it, then prefill each needle's question and answer after it."""
        with self.reader.open([self.haystack(kind, length)], strategy, ROOM) as (reading,):
            found, mark = self.prefill(reading, scored(length).tolist()), reading.mark()
            return Outcome(found, self.answers(lambda *pair: self.ask_prefilled(reading, mark, *pair)), facts(mark))

    def prefill(self, reading: Reading, positions: Sequence[int]) -> Tensor:
        """[positions, V], logs of the distributions after these tokens of a prompt, read to its end."""
        found: list[Tensor] = []
        self.reader.read(reading, positions, lambda position, logits: found.append(logs(logits[None])))
        return torch.cat(found)

    def decode(self, reading: Reading, tokens: Sequence[int]) -> Tensor:
        """[n, V], logs of the distributions after each of tokens [n], decoded after those before them."""
        predicted = self.reader.follow(reading, tokens)
        return logs(torch.cat([predicted[1:], reading.next_logits[None]]))

    def answers(self, ask: Ask) -> Tensor:
        """[needles] nats: negative log-likelihood of each number, a mean over its tokens."""
        return torch.stack([self._answer(ask, *pair) for pair in NEEDLES.items()])

    def _answer(self, ask: Ask, name: str, number: str) -> Tensor:
        question, answer = (self.encode(part) for part in (QUESTION.format(name), number))
        return -ask(question, answer)[torch.arange(len(answer)), torch.tensor(answer)].mean()

    def ask_prefilled(self, reading: Reading, mark: Mark, question: list[int], answer: list[int]) -> Tensor:
        """An `Ask` by prefill, after which the reading is back at the mark."""
        start = len(mark.prompt) + len(question) - 1
        self.reader.extend(reading, question + answer[:-1])
        found = self.prefill(reading, range(start, start + len(answer)))
        self.reader.rewind(reading, mark)
        return found

    def ask_decoded(self, reading: Reading, mark: Mark, question: list[int], answer: list[int]) -> Tensor:
        """An `Ask` by decoding, after which the reading is back at the mark."""
        found = self.decode(reading, question + answer[:-1])[len(question) - 1 :]
        self.reader.rewind(reading, mark)
        return found

    def encode(self, content: str) -> list[int]:
        return self.reader.engine.tokenizer.encode(content)

    def followers(self, kind: str, length: int) -> Tensor:
        """[SCORED], the token after each scored one."""
        return torch.tensor(self.haystack(kind, length))[scored(length) + 1]

    def haystack(self, kind: str, length: int) -> list[int]:
        """The text with the needles at even depths."""
        needles = [self.encode(NEEDLE.format(*pair)) for pair in NEEDLES.items()]
        straw = self._straw(kind, length - sum(map(len, needles)))
        bounds = [len(straw) * i // len(needles) for i in range(len(needles) + 1)]
        pieces = (straw[start:stop] for start, stop in pairwise(bounds))
        return [token for piece, needle in zip(pieces, needles, strict=True) for token in (*piece, *needle)]

    def _straw(self, kind: str, length: int) -> list[int]:
        tokens = self.encode(text(kind)[: 8 * length])[:length]
        if len(tokens) < length:
            raise ValueError(f"the text has {len(tokens)} tokens, {length} are needed")
        return tokens


def facts(mark: Mark) -> dict[str, float | None]:
    """Density of a prompt, and the coverage that its strategy estimates."""
    coverage = mark.coverage[Phase.PREFILL]
    return {
        "density": mark.reads[Phase.PREFILL].density,
        "coverage": coverage.mean,
        "coverage_min": coverage.least,
    }


def scored(length: int) -> Tensor:
    """[SCORED] int64, positions in the last three quarters."""
    return torch.linspace(length // 4, length - 2, SCORED).long()


def divergence(dense: Tensor, sparse: Tensor, followers: Tensor) -> dict[str, float]:
    """KL(dense || sparse) in nats, agreement on the likeliest token, change of perplexity on the text's own tokens."""
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    rows = torch.arange(len(followers))
    change = (dense[rows, followers] - sparse[rows, followers]).mean().exp() - 1
    return {
        "kl": float(kl.mean()),
        "kl_median": float(kl.median()),
        "kl_p99": float(kl.quantile(0.99)),
        "top1": float((dense.argmax(-1) == sparse.argmax(-1)).float().mean()),
        "perplexity_change": float(change),
    }
