"""What a strategy loses against dense, measured on one model in fp32: the work behind the benchmarks of quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from keysift.attention import Coverage, Dense, Reads, Strategy, Telemetry, bind
from keysift.engine.config import EngineConfig
from keysift.engine.memory.budget import cache_spec
from keysift.engine.model.load import load
from keysift.engine.model.loaded import LoadedModel
from keysift.kvcache import PagedCache, Span, Step

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
DECODED = 64
"""Tokens that are decoded at once: see `Bench.decode`."""
Run = Callable[[int, Tensor, Tensor], Tensor]
"""Runs tokens [T] from a position of the sequence on; gives [queries, V], the logs of next-token probabilities after
those at indices [queries]."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a strategy made of a text."""

    logs: Tensor
    """[SCORED, V], logs of next-token probabilities."""
    answers: Tensor
    """[needles], mean negative log-likelihood of the answer's tokens in nats."""
    facts: dict[str, float | None]
    """What it read and what it says that it kept; None: it does not say."""

    def against(self, dense: Reading, followers: Tensor) -> dict[str, float | None]:
        """All that is told of it, where these tokens [followers] really follow the first scored positions."""
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
    """A model, and dense readings of texts, which everything is compared with."""

    model: LoadedModel
    chunk: int
    row: int = 64
    dense: dict[tuple[str, int], Reading] = field(default_factory=dict)

    @classmethod
    def open(cls, chunk: int) -> Bench:
        """The embedded model in fp32: in bf16 dense differs from itself by a KL of 0.002."""
        return cls(load(EngineConfig(dtype="float32", device="cpu"), lambda message: None), chunk)

    def compare(self, kind: str, length: int, strategy: Strategy) -> dict[str, float | None]:
        """One strategy on the first `length` tokens of a text with needles in it, against dense.

        `length` is a multiple of the row, so that questions begin with a row.
        """
        if (kind, length) not in self.dense:
            self.dense.clear()  # its distributions are 300 MB
            self.dense[kind, length] = self.read(kind, length, Dense())
        return self.read(kind, length, strategy).against(self.dense[kind, length], self.followers(kind, length))

    @torch.inference_mode()
    def read(self, kind: str, length: int, strategy: Strategy) -> Reading:
        """Prefill the text, compare along it, then ask for its needles; questions are prefilled sparsely as well."""
        tokens = torch.tensor(self.haystack(kind, length))
        cache, sequence = self.sequence(length + ROOM)
        logs, steps = self.prefill(cache, sequence, tokens, scored(length), strategy)

        def run(start: int, tokens: Tensor, last: Tensor) -> Tensor:
            return self.run(cache, Span(sequence, start, len(tokens)), tokens, last, strategy, 0)[0]

        reads, covered = told(steps)
        facts = {"density": reads.density, "coverage": covered.mean, "coverage_min": covered.least}
        return Reading(logs, self.answers(run, length), facts)

    def answers(self, run: Run, start: int) -> Tensor:
        """[needles] nats: how unlikely each number is, a mean over its tokens, asked for behind `start` tokens."""
        return torch.stack([self.answer(run, start, *pair) for pair in NEEDLES.items()])

    def answer(self, run: Run, start: int, name: str, number: str) -> Tensor:
        """[] of one needle; each question is written over the one before."""
        question, answer = (self.model.tokenizer.encode(part) for part in (QUESTION.format(name), number))
        tokens = torch.tensor(question + answer[:-1])
        logs = run(start, tokens, torch.arange(len(question) - 1, len(tokens)))
        return -logs[torch.arange(len(answer)), torch.tensor(answer)].mean()

    def prefill(
        self, cache: PagedCache, sequence: int, tokens: Tensor, scored: Tensor, strategy: Strategy
    ) -> tuple[Tensor, list[Telemetry]]:
        """Chunk by chunk, as the engine does; logs of the distributions after the tokens at `scored`."""
        logs, steps = [], []
        for start in range(0, len(tokens), self.chunk):
            span = Span(sequence, start, min(self.chunk, len(tokens) - start))
            here = scored[(scored >= span.start) & (scored < span.stop)] - span.start
            out, telemetry = self.run(cache, span, tokens[span.start : span.stop], here, strategy, len(tokens))
            logs.append(out)
            steps.append(telemetry)
        return torch.cat(logs), steps

    def decode(
        self, cache: PagedCache, sequence: int, start: int, tokens: Tensor, last: Tensor, strategy: Strategy
    ) -> tuple[Tensor, list[Telemetry]]:
        """As `prefill`, but as generated tokens [T] from position `start` on; logs after those at indices `last`.

        The tokens of a decode step may as well be consecutive ones of one sequence: all keys of a layer are written
        before it is read, and no token sees a key behind it. So 64 of them take little longer than one.
        """
        logs, steps = [], []
        for first in range(0, len(tokens), DECODED):
            here = range(first, min(first + DECODED, len(tokens)))
            step = cache.decode([Span(sequence, start + i, 1) for i in here])
            inner = last[(last >= here.start) & (last < here.stop)] - first
            out, telemetry = self.forward(cache, step, tokens[here.start : here.stop], inner, strategy)
            logs.append(out)
            steps.append(telemetry)
        return torch.cat(logs), steps

    def run(
        self, cache: PagedCache, span: Span, tokens: Tensor, last: Tensor, strategy: Strategy, total: int
    ) -> tuple[Tensor, Telemetry]:
        return self.forward(cache, cache.prefill(span, self.row, max(total - span.stop, 0)), tokens, last, strategy)

    def forward(
        self, cache: PagedCache, step: Step, tokens: Tensor, last: Tensor, strategy: Strategy
    ) -> tuple[Tensor, Telemetry]:
        telemetry = Telemetry(cache.spec, step)
        logits = self.model.forward(tokens, step.positions, last, bind(strategy, cache, step, telemetry))
        return torch.log_softmax(logits, -1), telemetry

    def sequence(self, length: int) -> tuple[PagedCache, int]:
        """A cache of its own, and its only sequence."""
        spec = cache_spec(EngineConfig(), self.model)
        cache = PagedCache(spec, spec.pages_for(length), max_sequences=1, max_len=length)
        sequence = cache.open()
        cache.reserve(sequence, length)
        return cache, sequence

    def encode(self, content: str, length: int) -> list[int]:
        tokens = self.model.tokenizer.encode(content[: 8 * length])[:length]
        if len(tokens) < length:
            raise ValueError(f"the text has {len(tokens)} tokens, {length} are needed")
        return tokens

    def followers(self, kind: str, length: int) -> Tensor:
        """[SCORED], the token after each scored one."""
        return torch.tensor(self.haystack(kind, length))[scored(length) + 1]

    def haystack(self, kind: str, length: int) -> list[int]:
        """The text with the needles at even depths."""
        needles = [self.model.tokenizer.encode(NEEDLE.format(*pair)) for pair in NEEDLES.items()]
        straw = self.encode(text(kind), length - sum(map(len, needles)))
        bounds = [len(straw) * i // len(needles) for i in range(len(needles) + 1)]
        pieces = (straw[start:stop] for start, stop in pairwise(bounds))
        return [token for piece, needle in zip(pieces, needles, strict=True) for token in (*piece, *needle)]


def scored(length: int) -> Tensor:
    """[SCORED] int64, positions in the last three quarters."""
    return torch.linspace(length // 4, length - 2, SCORED).long()


def told(steps: Sequence[Telemetry]) -> tuple[Reads, Coverage]:
    """What these steps read, and what their selections say that they kept."""
    read = [telemetry.reads() for telemetry in steps]
    covered = [each for step, reads in zip(steps, read, strict=True) for each in step.coverage(reads)]
    return sum((each for reads in read for each in reads), Reads()), sum(covered, Coverage())


def divergence(dense: Tensor, sparse: Tensor, followers: Tensor) -> dict[str, float]:
    """KL(dense || sparse) in nats, agreement on the likeliest token, change of perplexity on what really follows."""
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
