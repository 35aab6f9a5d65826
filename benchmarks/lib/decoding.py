"""What a strategy for tokens loses against dense on one text: the work behind `decode_quality.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keysift.attention import Dense, Strategy, Telemetry
from keysift.kvcache import Context, PagedCache, Selection
from keysift.kvcache.index import FlatIndex, IndexSpec

from .quality import ROOM, Bench, Reading, told

SCORED = 256
"""Positions at the end of a text that are decoded, and whose next-token distributions are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched(Strategy):
    """Another strategy, and the share of each query's attention that its pages really hold."""

    inner: Strategy
    kept: list[Tensor] = field(default_factory=list, compare=False)
    """Of each step and layer [R, Hq]."""

    def __post_init__(self) -> None:
        """The other one has checked its options."""

    def decode(self, q: Tensor, context: Context) -> Selection:
        selection = self.inner.decode(q, context)
        self.kept.append(torch.ones(q.shape[:2]) if selection.complete else truly_kept(q, context, selection))
        return selection

    def index_spec(self) -> IndexSpec | None:
        return self.inner.index_spec()

    def facts(self) -> dict[str, float | None]:
        return {
            "kept": float(torch.cat(self.kept).mean()),
            "kept_min": float(torch.cat(self.kept).amin()),
        }


def truly_kept(q: Tensor, context: Context, selection: Selection) -> Tensor:
    """[R, Hq], by the exact attention of queries q [R, Hq, D]."""
    shares = FlatIndex().masses(q, context).softmax(-1)  # [R, Hq, F]
    chosen = selection.mask(shares.shape[2])
    return (shares * chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1)).sum(-1)


@dataclass(slots=True)
class Text:
    """A text with needles in it, read densely but for its last tokens, which are decoded under any strategy."""

    bench: Bench
    tokens: Tensor
    """[n]"""
    cache: PagedCache
    sequence: int
    dense: Reading = field(init=False)

    @classmethod
    @torch.inference_mode()
    def open(cls, bench: Bench, kind: str, length: int, strategies: Iterable[Strategy]) -> Text:
        """Its first tokens as a dense prompt, and the rest decoded under `Dense`.

        The indexes of all `strategies` see the prompt. What is decoded lies in pages that are written anew for every
        strategy, so no reading depends on the one before.
        """
        tokens = torch.tensor(bench.haystack(kind, length))
        cache, sequence = bench.sequence(length + ROOM)
        for index in {index for strategy in strategies if (index := strategy.index_spec())}:
            cache.index(index)
        bench.prefill(cache, sequence, tokens[:-SCORED], torch.arange(0), Dense())
        text = cls(bench, tokens, cache, sequence)
        text.dense = text.read(Dense())
        return text

    @torch.inference_mode()
    def compare(self, strategy: Strategy) -> dict[str, float | None]:
        """One strategy on the last tokens and on the needles, against dense. The last token has no follower."""
        return self.read(strategy).against(self.dense, self.tokens[1 - SCORED :])

    def read(self, strategy: Strategy) -> Reading:
        """Questions are decoded under the strategy as well as their answers."""
        length, watched = len(self.tokens), Watched(inner=strategy)

        def run(start: int, tokens: Tensor, last: Tensor) -> Tensor:
            return self.bench.decode(self.cache, self.sequence, start, tokens, last, strategy)[0]

        logs, steps = self.bench.decode(
            self.cache, self.sequence, length - SCORED, self.tokens[-SCORED:], torch.arange(SCORED), watched
        )
        return Reading(logs, self.bench.answers(run, length), {**facts(steps), **watched.facts()})


def facts(steps: Sequence[Telemetry]) -> dict[str, float | None]:
    """What steps of `SCORED` tokens read, and what their strategy says that it kept."""
    reads, covered = told(steps)
    return {
        "density": reads.density,
        "mb": reads.bytes / SCORED / 1e6,
        "coverage": covered.mean,
        "coverage_min": covered.least,
    }
