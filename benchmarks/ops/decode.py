"""One layer's attention of one new token, choosing included, against torch's SDPA, our own dense, and torch's own best.

Structured keys and queries (`lib/structured.py`), pages in scattered frames. *torch gather* is sparse decoding
without a kernel of its own: it ranks pages by the bounds of their keys, as Quest does, copies the chosen ones together
and attends to them, all in batched torch ops, with as many pages as the strategies' whole budget. Before every call
more memory is read than the CPU caches hold, as the model's weights and its other layers are between two tokens; that
is not timed, and shows whether a call was disturbed. *total* is the engine's own path, `bind`, which writes the new
key and value too; *select* and *attend* are its two parts by themselves.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keysift.attention import Strategy, bind, make
from keysift.attention.registry import StrategyError
from keysift.attention.token import TokenStrategy
from keysift.kvcache.native.library import isa

from ..lib import cli
from ..lib.layer import Layer, Source
from ..lib.shapes import COLD_BYTES, DTYPES, SHAPES
from ..lib.timing import Row, Timing, keeping, machine, measure, show
from ..lib.torch_pages import TorchPages

STRATEGIES: dict[str, dict[str, object]] = {
    "dense": {},
    "retrieval": {},
    "retrieval whole-budget": {"epsilon": 0.0},
    "retrieval bound": {"index": "bound", "epsilon": 0.0},
    "retrieval summary": {"index": "summary", "epsilon": 0.0},
    "retrieval ivf": {"index": "ivf"},
    "retrieval graph": {"index": "graph", "wait": True},
    "retrieval flat": {"index": "flat"},
    "quest": {"dense_layers": 0},
    "streaming": {},
}
FASTER, GROWTH = 8.0, 3.0
"""Aims: times faster than our own dense at the longest context, and the most that the cost may grow up to there."""


@dataclass(frozen=True, slots=True)
class Peers:
    """Seconds that others took for the same token."""

    sdpa: Timing
    gather: Timing
    dense: Timing


def layer_rows(shape: str, dtype: str, tokens: int, source: Source, names: list[str], runs: int) -> Iterator[Row]:
    """Torch's two, our dense, then the strategies."""
    strategies = {name: make(name.split()[0], **STRATEGIES[name]) for name in names}
    layer = Layer.make(source, DTYPES[dtype], tokens, strategies.values())
    fixed = {"shape": shape, "dtype": dtype, "tokens": tokens}
    time = functools.partial(measure, before=_cold(), runs=runs, least=0.01)
    sdpa, gather, rows = _torch_rows(layer, time)
    dense = time(_whole(layer, make("dense")))
    peers = Peers(sdpa, gather, dense)
    for row, timing in rows:
        yield _finished({**fixed, **row}, timing, peers)
    for name, strategy in strategies.items():
        row, timing = _own_row(name, strategy, layer, time, dense)
        yield _finished({**fixed, **row}, timing, peers)


def known(names: list[str]) -> Iterator[str]:
    """Those that can be made here; the others are named on stderr."""
    for name in names:
        try:
            make(name.split()[0], **STRATEGIES[name])
            yield name
        except StrategyError as error:
            print(f"left out: {name}: {error}", file=sys.stderr)


def _cold() -> Callable[[], object]:
    """Reads more than the CPU caches hold; reading leaves nothing that must be written back later."""
    return torch.ones(COLD_BYTES // 4).sum


def _whole(layer: Layer, strategy: Strategy) -> Callable[[], object]:
    attend = bind(strategy, layer.cache, layer.step)
    return lambda: attend(0, layer.q, layer.k, layer.v)


def _own_row(
    name: str, strategy: Strategy, layer: Layer, time: Callable[..., Timing], dense: Timing
) -> tuple[Row, Timing]:
    context = layer.context(strategy)
    selection = strategy.decode(layer.q, context)
    select = time(lambda: strategy.decode(layer.q, context))
    attend = time(lambda: layer.attend(selection))
    whole = dense if name == "dense" else time(_whole(layer, strategy))
    pages = int(selection.counts().sum()) * layer.k.shape[1] // selection.pages.shape[1]
    row: Row = {
        "what": name, "density": float(selection.density(layer.step).mean()), "select_ms": 1e3 * select.seconds,
        "attend_ms": 1e3 * attend.seconds, "GB/s": pages * context.spec.read_bytes / attend.seconds / 1e9,
    }  # fmt: skip
    return row, whole


def _torch_rows(layer: Layer, time: Callable[..., Timing]) -> tuple[Timing, Timing, list[tuple[Row, Timing]]]:
    """SDPA over contiguous keys, in the faster of two layouts, and attention to pages that torch's ops choose."""
    k, v = layer.in_a_row()
    pages, bytes_per_page = k.shape[:2].numel(), layer.cache.spec.read_bytes
    sdpa = min((time(work) for work in _sdpa(layer, k, v)), key=lambda timing: timing.seconds)
    whole: Row = {"what": "torch sdpa", "density": 1.0, "select_ms": 0.0, "attend_ms": 1e3 * sdpa.seconds,
                  "GB/s": pages * bytes_per_page / sdpa.seconds / 1e9}  # fmt: skip
    zones = make("retrieval")
    assert isinstance(zones, TokenStrategy)
    peer = TorchPages.make(k, v, sink=zones.sink, window=zones.window, budget=zones.budget)
    q = torch.unflatten(layer.q[0], 0, (k.shape[0], -1)).contiguous()
    chosen = peer.choose(q)
    select, attend = time(lambda: peer.choose(q)), time(lambda: peer.attend(q, chosen))
    gather = time(lambda: peer.attend(q, peer.choose(q)))
    gathered: Row = {
        "what": "torch gather", "density": chosen.shape[1] / k.shape[1], "select_ms": 1e3 * select.seconds,
        "attend_ms": 1e3 * attend.seconds, "GB/s": chosen.numel() * bytes_per_page / attend.seconds / 1e9,
    }  # fmt: skip
    return sdpa, gather, [(whole, sdpa), (gathered, gather)]


def _sdpa(layer: Layer, k: Tensor, v: Tensor) -> list[Callable[[], object]]:
    """Heads of a group by name, or as several queries of one head: torch is not always the same fast at both."""
    tokens = layer.step.spans[0].stop
    keys, values = (x.flatten(1, 2)[None, :, :tokens] for x in (k, v))
    single = layer.q[0][None, :, None]  # [1, Hq, 1, D]
    grouped = torch.unflatten(layer.q[0], 0, (k.shape[0], -1))[None]  # [1, Hkv, G, D]
    return [
        lambda: scaled_dot_product_attention(single, keys, values, enable_gqa=True),
        lambda: scaled_dot_product_attention(grouped, keys, values),
    ]


def _finished(row: Row, whole: Timing, peers: Peers) -> Row:
    rate = row.pop("GB/s")
    return {
        **{name: row[name] for name in ("what", "shape", "dtype", "tokens", "density", "select_ms", "attend_ms")},
        "total_ms": 1e3 * whole.seconds, "x dense": peers.dense.seconds / whole.seconds,
        "x sdpa": peers.sdpa.seconds / whole.seconds, "x gather": peers.gather.seconds / whole.seconds,
        "GB/s": rate, "quiet": all(timing.quiet for timing in (whole, peers.dense, peers.sdpa, peers.gather)),
    }  # fmt: skip


def rows(options: argparse.Namespace) -> Iterator[Row]:
    names = list(known(options.strategies))
    for shape, tokens in itertools.product(options.shape, options.tokens):
        torch.manual_seed(0)
        source = Source.make(SHAPES[shape], tokens + 1)
        for dtype in options.dtype:
            yield from layer_rows(shape, dtype, tokens, source, names, options.runs)


def summary(rows: list[Row]) -> Iterator[str]:
    """A line for each strategy, shape and dtype: is the longest context fast enough, and does the cost stay flat."""
    for what, shape, dtype in dict.fromkeys((row["what"], row["shape"], row["dtype"]) for row in rows):
        if what not in STRATEGIES or what == "dense":
            continue
        mine = [row for row in rows if (row["what"], row["shape"], row["dtype"]) == (what, shape, dtype)]
        first, last = (pick(mine, key=lambda row: row["tokens"]) for pick in (min, max))
        faster, growth = last["x dense"], last["total_ms"] / first["total_ms"]
        yield (
            f"{what}, {shape} {dtype}: at {last['tokens']} tokens {faster:.2f}x as fast as our dense"
            f" ({_met(faster >= FASTER)}at least {FASTER:.0f}x);"
            f" from {first['tokens']} to {last['tokens']} tokens its cost grows {growth:.2f}x"
            f" ({_met(growth <= GROWTH)}at most {GROWTH:.0f}x)"
        )


def _met(reached: bool) -> str:
    return "aim reached: " if reached else "AIM MISSED: "


def main() -> None:
    parser = cli.parser("benchmarks.ops.decode", __doc__)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768, 131072], help="cached, multiples of 16")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--runs", type=int, default=5, help="undisturbed runs to take the median of")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    kept: list[Row] = []
    show({**machine(), "isa": isa()}, keeping(rows(options), kept), as_json=options.json)
    if not options.json:
        print(*summary(kept), sep="\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
