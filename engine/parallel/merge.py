"""Merge of the ranks' step results into one of all heads. Every rank has the same number of heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TypeVar

from keysift.attention import Coverage, Locality, Reads
from keysift.kvcache import Traffic

from ..execution.forward import StepResult

T = TypeVar("T")


def merge_ranks(ranks: Sequence[StepResult]) -> StepResult:
    """Result of a step from those of all ranks, the leader's first, which has the sampled tokens."""
    return StepResult(
        sampled=ranks[0].sampled,
        reads=_each(_reads, [rank.reads for rank in ranks]),
        coverage=_each(_coverage, [rank.coverage for rank in ranks]),
        traffic=sum((rank.traffic for rank in ranks), Traffic()),
        locality=_each(lambda parts: sum(parts, Locality()), [rank.locality for rank in ranks]),
    )


def _each(join: Callable[[Sequence[T]], T], ranks: Sequence[Sequence[T]]) -> list[T]:
    """Join the ranks' statistics of each sequence."""
    return [join(parts) for parts in zip(*ranks, strict=True)]


def _reads(parts: Sequence[Reads]) -> Reads:
    return Reads(fmean(part.chosen for part in parts), parts[0].possible, sum(part.bytes for part in parts))


def _coverage(parts: Sequence[Coverage]) -> Coverage:
    return Coverage(
        tokens=parts[0].tokens,
        kept=fmean(part.kept for part in parts),
        lowest=min(part.lowest for part in parts),
        widened=fmean(part.widened for part in parts),
        estimated=fmean(part.estimated for part in parts),
        bound=fmean(part.bound for part in parts),
        chose=any(part.chose for part in parts),
    )
