"""A small valid call of every kernel: sequences of 12 tokens in 3 pages, among 6 frames."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from keysift.attention.ops.column_scores.native import column_scores
from keysift.attention.ops.paged_attention.native import paged_attention
from keysift.attention.ops.steady_pages.native import steady_pages
from keysift.attention.ops.top_pages.native import top_pages
from keysift.engine.model.cpu.native import linear
from keysift.kvcache.index.graph.native import link_keys, nearest_keys, search_graphs
from keysift.kvcache.index.graph.ops import KeyGraph, Reach
from keysift.kvcache.index.ivf.native import cluster, list_masses
from keysift.kvcache.native.call import Call
from keysift.kvcache.native.calls import LayerInCall, LayerOutCall, Matrix
from keysift.kvcache.ops.admit import Residents
from keysift.kvcache.ops.admit.native import admit
from keysift.kvcache.ops.encode import Codes
from keysift.kvcache.ops.encode.native import encode
from keysift.kvcache.ops.page_masses.native import code_masses, page_bounds
from keysift.kvcache.ops.read_pieces import Place
from keysift.kvcache.ops.read_pieces.native import read_pieces
from keysift.kvcache.ops.summarize.native import summarize

ROWS, HEADS, KV_HEADS, DIM, SIZE, PAGES, FRAMES = 2, 4, 2, 32, 4, 3, 6
SCALED = {"scale": DIM**-0.5}


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def queries() -> Tensor:
    return torch.randn(ROWS, HEADS, DIM)


def keys() -> Tensor:
    return torch.randn(FRAMES, KV_HEADS, SIZE, DIM)


def table(rows: int = ROWS) -> Tensor:
    return ints(1, 3, 5).expand(rows, KV_HEADS, PAGES).clone()


def last() -> Tensor:
    return ints(11, 9)


def codes() -> Codes:
    levels = torch.zeros(FRAMES, KV_HEADS, DIM // 16, SIZE, dtype=torch.int32)
    bounds = torch.zeros(FRAMES, KV_HEADS, 2, DIM, dtype=torch.int8)
    return Codes(levels, bounds, torch.ones(FRAMES, KV_HEADS, 2))


def attend() -> None:
    pages = ints(0, 2, -1).expand(ROWS, KV_HEADS, PAGES).clone()
    paged_attention(queries(), keys(), keys(), table(), pages, last(), queries_per_row=1, **SCALED)


def score() -> None:
    column_scores(queries(), keys(), table(1), ints(-1, 11), queries_per_probe=2, bands=True, **SCALED)


def scan_codes() -> None:
    own = ints(5, 5, 5, 5).view(ROWS, KV_HEADS)
    code_masses(queries(), keys(), own, codes(), table(), last(), candidates=1, **SCALED)


def scan_bounds() -> None:
    summaries, own = torch.randn(FRAMES, KV_HEADS, 4, DIM), ints(5, 5, 5, 5).view(ROWS, KV_HEADS)
    page_bounds(queries(), keys(), own, summaries, table(), last(), **SCALED)


def choose() -> None:
    masses = torch.randn(ROWS, HEADS, PAGES)
    top_pages(masses, ints(1, 1), ints(2, 2), heads=KV_HEADS, sinks=1, window=1, budget=1, epsilon=0.0)


def choose_steadily() -> None:
    masses, state = torch.randn(ROWS, HEADS, PAGES), (ROWS, KV_HEADS, PAGES)
    past = torch.ones(ROWS).bool(), torch.ones(state).bool(), torch.zeros(state)
    zones = {"heads": KV_HEADS, "sinks": 1, "window": 1, "budget": 1, "queried": 1}
    steady_pages(masses, ints(1, 1), ints(2, 2), *past, **zones, most=-1, factor=1.0, keep=0.5, epsilon=0.0)


def probe() -> None:
    lists = cluster(keys(), table(1)[:, :, 1:], lists=4, iterations=2)
    list_masses(queries(), keys(), table(), last(), lists, ints(0, 0).view(2, 1), segment=8, probes=2, **SCALED)


def walk() -> None:
    graph = KeyGraph(ints(1, -1).expand(KV_HEADS, 8, 2).clone(), ints(7, 0, -1).expand(KV_HEADS, 3).clone(), 1)
    search_graphs(queries(), keys(), table(), last(), [graph, None], Reach(2, 4, 3, 1, 2), **SCALED)


def build() -> None:
    nearest = nearest_keys(torch.randn(KV_HEADS, 2, DIM), keys(), ints(1, 3, 5), 0, 12, 3)
    link_keys(nearest, 12, 4)


def fill() -> None:
    summaries, frames = torch.randn(FRAMES, KV_HEADS, 4, DIM), torch.tensor([0, 5])
    summarize(summaries, keys(), keys(), frames)
    encode(keys(), summaries, frames, codes())


def fetch() -> None:
    residents = Residents(*(torch.full((KV_HEADS, count), -1, dtype=torch.int32) for count in (FRAMES, 2, 2)))
    admit(table(), ints(0, 2, -1).expand(ROWS, KV_HEADS, PAGES).clone(), residents, now=2, before=2)


def read() -> None:
    loads, slots = ints(0, -1).expand(KV_HEADS, 2).clone(), ints(2, -1).expand(KV_HEADS, 2).clone()
    with tempfile.TemporaryFile() as file:
        file.write(bytes(64))
        file.flush()
        read_pieces(torch.zeros(3, KV_HEADS, 8), file.fileno(), Place(1, 64, 0, 32), loads, slots)


def matrix(outputs: int, inputs: int) -> Matrix:
    return Matrix.pack(  # type: ignore[no-any-return]
        weight=torch.zeros(outputs, inputs), scales=None, bias=torch.zeros(outputs), outputs=outputs, inputs=inputs
    )


def project() -> None:
    linear(torch.randn(2, 64), torch.zeros(4, 64).to(torch.int8), torch.zeros(4), torch.ones(4, 1))
    x, turns, square = torch.zeros(2, 32), torch.zeros(2, 8), matrix(32, 32)
    common: dict[str, Any] = {"norm": x[0], "batch": 2, "type": 0, "eps": 0.0}
    heads = {"q": x, "k": x, "v": x, "to_q": square, "to_k": square, "to_v": square}
    LayerInCall.pack(x=x, cos=turns, sin=turns, dim=8, **heads, **common)
    weights = dict.fromkeys(("to_out", "gate", "up", "down"), square)
    LayerOutCall.pack(x=x, attended=x, out=x.clone(), **weights, **common)


EXAMPLES: tuple[Callable[[], None], ...] = (
    *(attend, score, scan_codes, scan_bounds, choose, choose_steadily, probe, walk, build, fill, fetch, read, project),
)


def captured() -> dict[str, list[dict[str, Any]]]:
    """The values of all calls that the examples pack, by structure."""
    found: dict[str, list[dict[str, Any]]] = {}
    with _spying(found):
        for example in EXAMPLES:
            torch.manual_seed(0)
            example()
    return found


@contextmanager
def _spying(found: dict[str, list[dict[str, Any]]]) -> Iterator[None]:
    kinds = Call.__subclasses__()
    packs = {kind: kind.pack for kind in kinds}

    def spy(kind: type[Call]) -> Any:
        def pack(**values: Any) -> Any:
            found.setdefault(kind.__name__, []).append(values)
            return packs[kind](**values)

        return staticmethod(pack)

    for kind in kinds:
        kind.pack = spy(kind)
    try:
        yield
    finally:
        for kind, pack in packs.items():
            kind.pack = staticmethod(pack)
