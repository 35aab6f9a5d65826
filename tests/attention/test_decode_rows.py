"""Consecutive tokens of one sequence in one decode step: same pages and same output as one by one."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from keysift.attention import Dense, Strategy, StrategyError, Telemetry, bind, find, known
from keysift.attention.registry import options
from keysift.kvcache import CacheSpec, PagedCache, Phase, Selection, Span
from tests.strategies import Row, rows

LAYERS, HEADS, KV_HEADS, DIM, PAGE = 2, 4, 2, 16, 16
PROMPT, TOKENS = 2024, 48
"""The prompt ends within a page; a segment of 2,048 tokens, of which indexes make lists, is full amid the tokens."""
Pages = list[list[list[int]]]
"""Of each row, of each layer and head."""


def strategies() -> list[Strategy]:
    """All strategies that choose for tokens, and every combination of the words that their options take."""
    chosen = [row for row in rows(PAGE) if row.chooses(Phase.DECODE)]
    firsts = {row.name: row for row in reversed(chosen) if row.name in known()}
    worded = [settled(row, dict(words)) for row in firsts.values() for words in product(*choices(row.name))]
    return list(dict.fromkeys([Dense(), *worded, *(row.make() for row in chosen)]))


def choices(name: str) -> list[list[tuple[str, str]]]:
    """For each option that takes a word, the pairs of the option and a word."""
    return [
        [(each.name, word) for word in each.bounds["enum"]] for each in options(find(name)) if "enum" in each.bounds
    ]


def settled(row: Row, words: dict[str, str]) -> Strategy:
    """The row's strategy with these words; a graph is complete before the first token, or its answers would vary."""
    try:
        return row.make(**words, wait=True)
    except StrategyError:  # no graph
        return row.make(**words)


@pytest.mark.parametrize("strategy", strategies(), ids=repr)
def test_tokens_decoded_at_once_are_those_decoded_one_by_one(strategy: Strategy) -> None:
    qkv = make_qkv()
    spans = [Span(0, PROMPT + i, 1) for i in range(TOKENS)]
    alone, pages_alone = decode(strategy, qkv, [[span] for span in spans])
    for size in (TOKENS, 7):
        together, pages = decode(strategy, qkv, [spans[i : i + size] for i in range(0, TOKENS, size)])
        torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-5)
        assert pages == pages_alone


def make_qkv() -> list[Tensor]:
    """For each layer packed [T, Hq + 2 Hkv, D], with queries that some keys stand out for."""
    packed = torch.randn(LAYERS, PROMPT + TOKENS, HEADS + 2 * KV_HEADS, DIM)
    packed[:, :, :HEADS] *= 2
    return list(packed)


def decode(strategy: Strategy, qkv: list[Tensor], steps: list[list[Span]]) -> tuple[Tensor, Pages]:
    """The prompt densely, then these steps: [L, T, Hq, D], and the pages of each token, layer by layer."""
    spec = CacheSpec(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM)
    cache = PagedCache(spec, spec.pages_for(PROMPT + TOKENS), max_sequences=1, max_len=PROMPT + TOKENS)
    index = strategy.index_spec()
    cache.reserve(cache.open(*([] if index is None else [index])), PROMPT + TOKENS)
    attend(Dense(), cache, [Span(0, 0, PROMPT)], qkv)
    parts = [attend(strategy, cache, spans, qkv) for spans in steps]
    return torch.cat([out for out, _ in parts], 1), [pages for _, listed in parts for pages in listed]


def attend(strategy: Strategy, cache: PagedCache, spans: list[Span], qkv: list[Tensor]) -> tuple[Tensor, Pages]:
    """One step: a prompt where its only span is longer than a token."""
    step = cache.decode(spans) if spans[0].length == 1 else cache.prefill(spans[0], 64)
    noted = Noted(cache.spec, step)
    run = bind(strategy, cache, step, noted)
    packed = [layer[step.positions].split([HEADS, KV_HEADS, KV_HEADS], 1) for layer in qkv]
    outs = [run(layer, *tensors) for layer, tensors in enumerate(packed)]
    return torch.stack(outs), noted.pages()


class Noted(Telemetry):
    """Telemetry that keeps the selections too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._chosen: list[Selection] = []

    def record(self, layer: int, selection: Selection, exact: Tensor | None = None, lse: Tensor | None = None) -> None:
        super().record(layer, selection, exact, lse)
        self._chosen.append(selection)

    def pages(self) -> Pages:
        """Of each row, its lists of all layers and heads."""
        lists = [[head[head >= 0].tolist() for head in row] for each in self._chosen for row in each.pages]
        rows = len(lists) // len(self._chosen)
        return [[pages for layer in lists[row::rows] for pages in layer] for row in range(rows)]
