"""Calls that a kernel cannot do are refused by its twin, whatever the mode: the reference runs instead."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("keysift.kvcache.native.library", exc_type=ImportError)

from keysift.attention.ops.column_scores.native import column_scores
from keysift.attention.ops.paged_attention.native import paged_attention
from keysift.attention.ops.steady_pages.native import steady_pages
from keysift.attention.ops.top_pages.native import top_pages
from keysift.kvcache.index.graph import ops
from keysift.kvcache.index.graph.native import link_keys, nearest_keys, search_graphs
from keysift.kvcache.index.graph.ops import KeyGraph, Reach
from keysift.kvcache.index.ivf.lists import list_masses as list_masses_op
from keysift.kvcache.index.ivf.native import cluster, list_masses
from keysift.kvcache.native.checks import checked
from keysift.kvcache.ops import use_backend
from keysift.kvcache.ops.admit import Residents
from keysift.kvcache.ops.admit.native import admit
from keysift.kvcache.ops.dispatch import UnsupportedCall
from keysift.kvcache.ops.encode import Codes
from keysift.kvcache.ops.encode.native import encode
from keysift.kvcache.ops.page_masses.native import code_masses, page_bounds, page_masses
from keysift.kvcache.ops.read_pieces import Place
from keysift.kvcache.ops.read_pieces.native import read_pieces
from keysift.kvcache.ops.summarize.native import summarize

from .examples import DIM, FRAMES, HEADS, KV_HEADS, PAGES, ROWS, SCALED, codes, ints, keys, last, queries, table

HUGE = 2**31 - 1
OWN = ints(5, 5, 5, 5).view(ROWS, KV_HEADS)
LISTS = ints(0, 2, -1).expand(ROWS, KV_HEADS, PAGES).clone()
SUMMARIES = torch.zeros(FRAMES, KV_HEADS, 4, DIM)
MASSES, STATE = torch.zeros(ROWS, HEADS, PAGES), torch.zeros(ROWS, KV_HEADS, PAGES)
ZONES = {"heads": KV_HEADS, "sinks": 1, "window": 1, "budget": 1}
STEADY = {**ZONES, "queried": 1, "most": -1, "factor": 1.0, "keep": 0.5, "epsilon": 0.0}
RESIDENTS = Residents(*(torch.full((KV_HEADS, count), -1, dtype=torch.int32) for count in (FRAMES, 2, 2)))
GRAPH = KeyGraph(ints(1, -1).expand(KV_HEADS, 8, 2).clone(), ints(7, 0, -1).expand(KV_HEADS, 3).clone(), 1)
WIDE: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "paged_attention": (paged_attention, (queries(), keys(), keys(), table(), LISTS, last()), {"queries_per_row": 1}),
    "column_scores": (column_scores, (queries(), keys(), table(1), ints(-1, 11)), {"queries_per_probe": 2}),
    "page_masses": (page_masses, (queries(), keys(), table(), last()), {}),
    "code_masses": (code_masses, (queries(), keys(), OWN, codes(), table(), last()), {"candidates": 1}),
    "page_bounds": (page_bounds, (queries(), keys(), OWN, SUMMARIES, table(), last()), {}),
    "top_pages": (top_pages, (MASSES, ints(1, 1), ints(2, 2)), {**ZONES, "epsilon": 0.0}),
    "steady_pages": (steady_pages, (MASSES, ints(1, 1), ints(2, 2), last() > 0, STATE > 0, STATE), STEADY),
    "cluster": (cluster, (keys(), table(1)), {"lists": 4, "iterations": 2}),
    "search_graphs": (search_graphs, (queries(), keys(), table(), last(), [GRAPH] * ROWS, Reach(2, 4, 3, 1, 2)), {}),
    "nearest_keys": (nearest_keys, (torch.zeros(KV_HEADS, 2, DIM), keys(), ints(1, 3, 5), 0, 12, 3), {}),
    "link_keys": (link_keys, (ints(1, 2).expand(KV_HEADS, 2, 2), 12, 4), {}),
    "summarize": (summarize, (SUMMARIES, keys(), keys(), torch.tensor([0, 5])), {}),
    "encode": (encode, (keys(), SUMMARIES, torch.tensor([0, 5]), codes()), {}),
    "admit": (admit, (table(), LISTS, RESIDENTS), {"now": 2, "before": 2}),
}
SCALES = {"paged_attention", "column_scores", "page_masses", "code_masses", "page_bounds", "search_graphs"}


def call(name: str, change: Callable[[Any], Any] = lambda value: value, at: int = 0) -> None:
    twin, values, options = WIDE[name]
    values = tuple(change(value) if i == at else value for i, value in enumerate(values))
    twin(*values, **options, **(SCALED if name in SCALES else {}))


def other_width(value: Any) -> Any:
    """The same integers in another width."""
    if isinstance(value, Codes | Residents):
        return type(value)(*(other_width(part) for part in value))
    if isinstance(value, Tensor) and value.dtype in (torch.int8, torch.int32, torch.int64):
        return value.to(torch.int32 if value.dtype == torch.int64 else torch.int64)
    return value


def integers() -> list[tuple[str, int]]:
    return [
        (name, at) for name, (_, values, _) in WIDE.items() for at, value in enumerate(values)
        if other_width(value) is not value
    ]  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_what_is_refused_below_is_supported_otherwise(name: str) -> None:
    call(name)


@pytest.mark.parametrize(("name", "at"), integers())
def test_integers_of_another_width_are_refused(name: str, at: int) -> None:
    with checked(False), pytest.raises(UnsupportedCall):
        call(name, other_width, at)


def test_reads_of_another_width_or_with_strides_are_refused() -> None:
    pool, slots, place = torch.zeros(3, KV_HEADS, 8), ints(2, 1).expand(KV_HEADS, 2), Place(1, 64, 0, 32)
    loads = torch.zeros(KV_HEADS, 2, dtype=torch.int32)
    with tempfile.TemporaryFile() as file, checked(False):
        for wrong in ((pool, loads.long(), slots.long()), (pool, loads, slots), (pool[:, :, ::2], loads, loads)):
            with pytest.raises(UnsupportedCall):
                read_pieces(wrong[0], file.fileno(), place, *wrong[1:])


def test_sizes_that_would_divide_by_zero_or_have_no_room_are_refused() -> None:
    lists = cluster(keys(), table(1)[:, :, 1:], lists=4, iterations=2)
    probe = (queries(), keys(), table(), last(), lists, ints(0, 0).view(2, 1))
    tries: list[Callable[[], Any]] = [
        lambda: cluster(keys(), table(1), lists=0, iterations=1),
        lambda: cluster(keys(), table(1), lists=4, iterations=0),
        lambda: cluster(keys(), table(1)[:, :, :0], lists=4, iterations=1),
        lambda: cluster(keys(), table(1).repeat(1, 1, 3000), lists=4, iterations=1),  # positions of 16 bits
        lambda: list_masses(*probe, segment=8, probes=0, **SCALED),
        lambda: nearest_keys(torch.zeros(KV_HEADS, 2, DIM), keys(), ints(1), 0, 4, 0),
        lambda: search_graphs(queries(), keys(), table(), last(), [None] * 2, Reach(2, 0, 3, 1, 2), 1.0),
        lambda: search_graphs(queries(), keys(), table(), last(), [None] * 2, Reach(2, 4, 0, 1, 2), 1.0),
    ]
    for wrong in tries:
        with checked(False), pytest.raises(UnsupportedCall):
            wrong()


@pytest.mark.parametrize("huge", [HUGE, 2**31, 2**40])
def test_limits_beyond_the_context_change_nothing(huge: int) -> None:
    """Nor do they take memory, or overflow."""
    lists = cluster(keys(), table(1)[:, :, 1:], lists=4, iterations=2)
    probe = (queries(), keys(), table(), last(), lists, ints(0, 0).view(2, 1))
    walk = (queries(), keys(), table(), last(), [GRAPH, None])
    for reach in (Reach(2, huge, 3, 1, 2), Reach(2, 4, 3, huge, 2), Reach(2, 4, 3, 1, huge)):
        with use_backend("reference"):
            expected = ops.search_graphs(*walk, reach, 1.0)
        for got, want in zip(search_graphs(*walk, reach, 1.0), expected, strict=True):
            torch.testing.assert_close(got, want)
    with use_backend("reference"):
        expected_masses = list_masses_op(*probe, segment=8, probes=min(huge, 10**6), **SCALED)
    got_masses = list_masses(*probe, segment=8, probes=huge, **SCALED)
    torch.testing.assert_close(got_masses, expected_masses)
