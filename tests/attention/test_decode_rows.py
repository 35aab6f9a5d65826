"""Consecutive tokens of one sequence in one decode step: what they read and what comes out is as if one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import product
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from keysift.attention import Dense, Strategy, Telemetry, bind, known, make
from keysift.attention.block import BlockStrategy
from keysift.attention.token import TokenStrategy
from keysift.kvcache import CacheSpec, PagedCache, Selection, Span

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
PROMPT, TOKENS = 2024, 48
"""The prompt ends within a page; a segment of 2,048 tokens, of which indexes make lists, is full amid the tokens."""
SMALL = {"sink": 16, "window": 24, "budget": 32, "top_k": 32, "dense_layers": 0}
SMALL |= {"topk": 6, "query_blocks": 4, "window_size": 64}
SMALL |= {"wait": True}  # a graph that is built beside the answers changes them whenever it is ready
Pages = list[list[list[int]]]
"""Of each row, of each layer and head."""


def strategies() -> Iterator[Strategy]:
    """All that choose for tokens, over every choice among words that their options leave; budgets that bite."""
    yield Dense()
    yield make("streaming", sink=16, window=24)
    for name, kind in known().items():
        if issubclass(kind, TokenStrategy | BlockStrategy) or "decode" in vars(kind):
            hints, named = get_type_hints(kind), [field.name for field in fields(kind)]
            words = {field: get_args(hints[field]) for field in named if get_origin(hints[field]) is Literal}
            for choice in product(*words.values()):
                small = {field: value for field, value in SMALL.items() if field in named}
                yield make(name, **small, **dict(zip(words, choice, strict=True)))


@pytest.mark.parametrize("strategy", list(strategies()), ids=repr)
def test_tokens_decoded_at_once_are_those_decoded_one_by_one(strategy: Strategy) -> None:
    qkv = make_qkv()
    spans = [Span(0, PROMPT + i, 1) for i in range(TOKENS)]
    alone, pages_alone = decode(strategy, qkv, [[span] for span in spans])
    for size in (TOKENS, 7):
        together, pages = decode(strategy, qkv, [spans[i : i + size] for i in range(0, TOKENS, size)])
        torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-5)
        assert pages == pages_alone


def make_qkv() -> list[Tensor]:
    """Of each layer the packed [T, Hq + 2 Hkv, D], with queries that some keys stand out for."""
    packed = torch.randn(LAYERS, PROMPT + TOKENS, HEADS + 2 * KV_HEADS, DIM)
    packed[:, :, :HEADS] *= 2
    return list(packed)


def decode(strategy: Strategy, qkv: list[Tensor], steps: list[list[Span]]) -> tuple[Tensor, Pages]:
    """The prompt densely, then these steps: [L, T, Hq, D], and the pages of each token, layer by layer."""
    spec = CacheSpec(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM)
    cache = PagedCache(spec, spec.pages_for(PROMPT + TOKENS), max_sequences=1, max_len=PROMPT + TOKENS)
    if (index := strategy.index_spec()) is not None:
        cache.index(index)  # so that it sees the prompt
    cache.reserve(cache.open(), PROMPT + TOKENS)
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
    """Keeps the chosen pages too."""

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
