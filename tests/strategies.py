"""Every registered strategy with options that leave pages out, and options that read everything.

A new strategy adds one row to `rows`: all laws then run on it, those of attention, of the cache's tiers and of the
engine. `tests/attention/test_strategies.py` fails for a registered strategy without one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from keysift.attention import Dense, Strategy, known, make
from keysift.attention.prompt import PromptStrategy
from keysift.kvcache import Phase


@dataclass(frozen=True)
class Row:
    """One strategy under test."""

    name: str
    sparse: dict[str, object]
    full: dict[str, object]
    per_query_head: bool = False
    """Its pages are listed per query head, so that the op sums in another order than for `dense`."""
    spec: dict[str, object] = field(default_factory=dict)
    """Fields of the `CacheSpec` that it needs."""
    blind: bool = False
    """Its selection depends on no query, so planted structure is not found."""

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.sparse.values())])

    def make(self, **changes: object) -> Strategy:
        """The sparse strategy, with those of these options that it has."""
        return make(self.name, **self.sparse | self._own(changes))

    def arguments(self, **changes: object) -> tuple[str, ...]:
        """The options of `make` as a command line spells them."""
        return tuple(f"{key}={value}" for key, value in (self.sparse | self._own(changes)).items())

    def chooses(self, phase: Phase) -> bool:
        return not isinstance(self.make().part(phase), Dense)

    def _own(self, options: dict[str, object]) -> dict[str, object]:
        names = {each.name for each in fields(make(self.name))}
        return {key: value for key, value in options.items() if key in names}


def rows(page: int) -> list[Row]:
    """All rows, for pages of so many tokens."""
    small: dict[str, object] = {"sink": page, "local": page, "last_rows_dense": 0}
    zones: dict[str, object] = {"sink": page, "window": page + page // 2}
    blocks = {"kernel_size": 2 * page, "kernel_stride": page, "block_size": 2 * page, "window_size": 2 * page}
    biased: dict[str, object] = {"bias_channels": 8, "scale": 16**-0.5}
    all_of: dict[str, object] = {"budget": 10**6, "epsilon": 0.0}
    few = {**zones, "budget": 2 * page}
    return [
        Row("dense", {}, {}),
        Row("streaming", {"sink": page, "window": 3 * page}, {"sink": 0, "window": 10**6}, blind=True),
        Row("ashape", small, {"local": 10**6}, True, blind=True),
        Row("flexprefill", {"gamma": 0.3, "min_budget": 0, **small}, {"gamma": 1.0}, True),
        Row("oracle", {"threshold": 0.3, **small}, {"threshold": 0.0}, True),
        Row("sift", {"threshold": 0.1, "group": 2, **small}, {"threshold": 0.0, "group": 4}, True),
        Row("minference", {"vertical_size": 48, "slash_size": 4, "last_q": 8, **small}, {"vertical_size": 10**6}, True),
        Row("sampleattention", {"alpha": 0.3, **small}, {"alpha": 1.0}, True),
        Row("xattention", {"threshold": 0.3, "stride": 2, **small}, {"threshold": 1.0}, True),
        Row("quest", {"budget": 2 * page, "window": page, "dense_layers": 0}, {"budget": 10**6}),
        Row("topk", {"sink": page, "window": page, "top_k": 3}, {"top_k": 10**6}, True),
        Row("retrieval", {**few, "epsilon": 0.0}, all_of),
        Row("retrieval", {**few, "index": "flat"}, {**all_of, "index": "flat"}),
        Row("retrieval", {**few, "index": "summary"}, {**all_of, "index": "summary"}),
        Row("retrieval", {**few, "index": "ivf"}, {**all_of, "index": "ivf"}),
        Row("retrieval", {**few, "index": "graph", "wait": True}, all_of),
        Row("retrieval", {**zones, "budget": 10 * page, "epsilon": 0.3, "certify": True}, {**all_of, "certify": True}),
        Row("nosa", {**few, "queried": 2 * page, "m_max": 1}, {"budget": 10**6}),
        Row("nosa", {**zones, "budget": 3 * page, "m_max": 0, "index": "flat"}, {"budget": 10**6, "index": "flat"}),
        Row(
            "nosa",
            {**few, "m_max": 0, "epsilon": 1.0, "refused": "drop", "certify": True},
            {"budget": 10**6, "queried": 0, "m_max": 0, "refused": "drop"},
        ),
        Row("infllmv2", {**blocks, "topk": 2, "dense_below": 0}, {"topk": 10**6, "dense_below": 0}),
        Row("infllmv2", {**blocks, "topk": 2, "dense_below": 0}, {"topk": 10**6, "dense_below": 0}, spec=biased),
        Row(
            "nosa-trained",
            {**blocks, "query_blocks": 4, "topk": 6, "dense_below": 0},
            {"topk": 10**6, "dense_below": 0},
            spec=biased,
        ),
        Row("dense+streaming", {"streaming.sink": page, "streaming.window": 3 * page}, {"streaming.window": 10**6}),
    ]


ROWS = rows(4)
IDS = list(map(str, ROWS))


def prompt_rows(page: int = 4) -> list[Row]:
    """Strategies with the options that all prompt strategies share."""
    return [row for row in rows(page) if isinstance(row.make(), PromptStrategy)]


def unnamed(strategies: Iterable[str], page: int) -> list[str]:
    """Strategies that a list spelt ``name option=value ...`` leaves out and that run on any model, spelt like these."""
    names = {each.split()[0] for each in strategies}
    left = [row for row in rows(page) if row.name in known() and row.name not in names and not row.spec]
    return [" ".join([row.name, *row.arguments(dense_below=0)]) for row in left]
