"""What a prompt strategy loses against dense, measured on one model in fp32: the work behind `prefill_quality.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from texts import text
from torch import Tensor

from keysift.attention import Coverage, Dense, Reads, Strategy, Telemetry, bind
from keysift.engine.config import EngineConfig
from keysift.engine.memory import cache_spec
from keysift.engine.model import LoadedModel, load
from keysift.kvcache import PagedCache, Span

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


@dataclass(frozen=True, slots=True)
class Reading:
    """What a strategy made of a text."""

    logs: Tensor
    """[SCORED, V], logs of next-token probabilities."""
    answers: Tensor
    """[needles], mean negative log-likelihood of the answer's tokens in nats."""
    density: float
    coverage: float | None
    """Mean attention mass that the probes kept; None: the strategy has none."""
    coverage_min: float | None


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
        dense, sparse = self.dense[kind, length], self.read(kind, length, strategy)
        return {
            "density": sparse.density,
            "coverage": sparse.coverage,
            "coverage_min": sparse.coverage_min,
            **divergence(dense.logs, sparse.logs, self.followers(kind, length)),
            "needle_nll": float(sparse.answers.mean()),
            "needle_loss": float((sparse.answers - dense.answers).mean()),
            "needle_loss_worst": float((sparse.answers - dense.answers).max()),
        }

    @torch.inference_mode()
    def read(self, kind: str, length: int, strategy: Strategy) -> Reading:
        """Prefill the text, compare along it, then ask for its needles; questions are prefilled sparsely as well."""
        tokens = torch.tensor(self.haystack(kind, length))
        with self.sequence(length + ROOM) as (cache, sequence):
            logs, steps = self.prefill(cache, sequence, tokens, scored(length), strategy)
            answers = [self.answer(cache, sequence, length, *pair, strategy) for pair in NEEDLES.items()]
        read = [telemetry.reads() for telemetry in steps]
        covered = sum((step.covered(reads)[0] for step, reads in zip(steps, read, strict=True)), Coverage())
        density = sum((reads[0] for reads in read), Reads()).density
        return Reading(logs, torch.stack(answers), density, covered.mean, covered.least)

    def answer(
        self, cache: PagedCache, sequence: int, start: int, name: str, number: str, strategy: Strategy
    ) -> Tensor:
        """[] mean negative log-likelihood of a needle's number; each question is written over the one before."""
        question, answer = (self.model.tokenizer.encode(part) for part in (QUESTION.format(name), number))
        tokens = torch.tensor(question + answer[:-1])
        last = torch.arange(len(question) - 1, len(tokens))
        logs, _ = self.run(cache, Span(sequence, start, len(tokens)), tokens, last, strategy, 0)
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

    def run(
        self, cache: PagedCache, span: Span, tokens: Tensor, last: Tensor, strategy: Strategy, total: int
    ) -> tuple[Tensor, Telemetry]:
        step = cache.prefill(span, self.row, max(total - span.stop, 0))
        telemetry = Telemetry(cache.spec, step)
        logits = self.model.forward(tokens, step.positions, last, bind(strategy, cache, step, telemetry))
        return torch.log_softmax(logits, -1), telemetry

    @contextmanager
    def sequence(self, length: int) -> Iterator[tuple[PagedCache, int]]:
        spec = cache_spec(EngineConfig(), self.model)
        cache = PagedCache(spec, spec.pages_for(length), max_sequences=1, max_len=length)
        sequence = cache.open()
        cache.reserve(sequence, length)
        yield cache, sequence

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
