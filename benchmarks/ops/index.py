"""Recall of each index for the best keys and the best pages, against the share of keys that it scans.

Keys and queries of seven layers of the embedded model over a real text, and structured ones (`lib/structured.py`) in a
context as long as that model has none. The queries come at the end, the keys from the start; the first 64, which nearly
every query reads, and the nearest, which a window holds anyway, are left out of both, so nothing is found for free.
*real*: queries search, as in attention; *keys*: later keys search among keys, which is what indexes are made for.

recall: found share of the 100 keys with the greatest products, mean, and that of the worst head; an index over pages
finds what lies on the pages that a budget of 1,024 tokens reads. pages: of the 32 pages that hold most attention.
scanned: vectors multiplied with the query, stand-ins of keys included, as a share of the keys. query: of one head.

Our `ivf` looks at every key that no full segment covers: the shorter the context, the larger its least share.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..lib import cli
from ..lib.captured import Captured, of_text
from ..lib.faiss_searchers import faiss_families
from ..lib.searchers import BEST_KEYS, PAGE, Family, Found, Problem, Searcher, own_families
from ..lib.structured import structured
from ..lib.timing import Row, keeping, machine, show

SINK, WINDOW = 64, 256
BEST_PAGES, BUDGET = 32, 1024
Case = tuple[Problem, dict[str, Tensor]]
"""Keys, and queries [n, H, D] of each kind."""


def captured_cases(captured: Captured, count: int) -> list[Case]:
    return [split(q, k, count) for q, k in zip(captured.q, captured.k, strict=True)]


def structured_cases(tokens: int, count: int) -> list[Case]:
    """One KV head of a model with heads of 128 channels, and its four query heads: every second kind that there is."""
    torch.manual_seed(0)
    q, k, _ = structured(tokens, 4, 1, 128, torch.float32)
    return [split(q, k, count)]


def split(q: Tensor, k: Tensor, count: int) -> Case:
    """Problem from q [T, Hq, D] and k [T, Hkv, D]: the last `count` search the keys between sinks and window."""
    stop = SINK + (len(k) - count - WINDOW - SINK) // PAGE * PAGE
    return Problem(k[SINK:stop], q[SINK:stop]), {"real": q[-count:], "keys": k[-count:]}


def rows(dataset: str, cases: list[Case], families: dict[str, tuple[Family, list[str]]]) -> Iterator[Row]:
    """A row for each index, setting and kind of query: over all layers and heads."""
    truths = [{kind: Truth.make(problem, q) for kind, q in queries.items()} for problem, queries in cases]
    for name, (make, settings) in families.items():
        searchers = [make(problem) for problem, _ in cases]
        for kind in cases[0][1]:
            for setting in settings:
                yield {"dataset": dataset, "queries": kind, "index": name, "setting": setting, **outcome(
                    setting, searchers, [queries[kind] for _, queries in cases], [truth[kind] for truth in truths]
                )}  # fmt: skip


def outcome(setting: str, searchers: list[Searcher], queries: list[Tensor], truths: list[Truth]) -> Row:
    found = [searcher.search(q, setting) for searcher, q in zip(searchers, queries, strict=True)]
    recall = torch.cat([truth.keys_found(answer) for truth, answer in zip(truths, found, strict=True)])
    pages = torch.cat([truth.pages_found(answer) for truth, answer in zip(truths, found, strict=True)])
    return {
        "recall": float(recall.mean()), "worst": float(recall.min()),
        "pages": float(pages.mean()), "worst ": float(pages.min()),
        "scanned": statistics.fmean(answer.scanned for answer in found),
        "bytes/key": statistics.fmean(searcher.bytes_per_key[setting] for searcher in searchers),
        "build_s": statistics.fmean(searcher.build_seconds[setting] for searcher in searchers),
        "query_ms": 1e3 * statistics.fmean(answer.seconds for answer in found),
    }  # fmt: skip


class Truth:
    """Results of exact search."""

    def __init__(self, keys: Tensor, pages: Tensor) -> None:
        self.keys = keys  # [n, H, BEST_KEYS]
        self.pages = pages  # [n, H, BEST_PAGES]

    @classmethod
    def make(cls, problem: Problem, q: Tensor) -> Truth:
        grouped = torch.unflatten(q, 1, (problem.keys.shape[1], -1))
        scores = torch.einsum("nkgd,tkd->nkgt", grouped, problem.keys).flatten(1, 2) * problem.scale
        masses = torch.unflatten(scores, 2, (-1, PAGE)).logsumexp(-1)
        return cls(scores.topk(BEST_KEYS).indices, masses.topk(BEST_PAGES).indices)

    def keys_found(self, found: Found) -> Tensor:
        """[H]"""
        if found.keys is not None:
            return (self.keys[..., None] == found.keys[..., None, :]).any(-1).float().mean((0, 2))
        best = found.masses.topk(min(BUDGET // PAGE, found.masses.shape[2])).indices
        return (self.keys[..., None] // PAGE == best[..., None, :]).any(-1).float().mean((0, 2))

    def pages_found(self, found: Found) -> Tensor:
        """[H]"""
        best = found.masses.topk(BEST_PAGES)
        known = best.indices.masked_fill(best.values.isneginf(), -1)
        return (self.pages[..., None] == known[..., None, :]).any(-1).float().mean((0, 2))


def families(names: list[str] | None) -> dict[str, tuple[Family, list[str]]]:
    """All, or those whose names begin with one of these."""
    every = own_families()
    try:
        every |= faiss_families()
    except ImportError:
        print("left out: faiss (pip install faiss-cpu)", file=sys.stderr)
    return {name: family for name, family in every.items() if names is None or name.startswith(tuple(names))}


def plot(rows: list[Row], path: Path) -> None:
    """Recall against the share of keys scanned, one panel for each dataset and kind of query."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["dataset"], row["queries"]) for row in rows))
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (dataset, kind) in zip(axes, panels, strict=True):
        here = [row for row in rows if (row["dataset"], row["queries"]) == (dataset, kind)]
        for name in dict.fromkeys(row["index"] for row in here):
            line = sorted((row["scanned"], row["recall"]) for row in here if row["index"] == name)
            style = "s--" if name.startswith("faiss") else "o-"
            axis.plot([x for x, _ in line], [y for _, y in line], style, ms=3, lw=1, label=name)
        axis.set(title=f"{dataset}, {kind} search", xlabel="share of keys scanned", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=f"recall@{BEST_KEYS}")
    axes[0].legend(fontsize=6)
    figure.savefig(path)


def main() -> None:
    parser = cli.parser("benchmarks.ops.index", __doc__)
    parser.add_argument("--captured", type=Path, help="a file of captured.py; without it the model runs now")
    parser.add_argument("--layers", nargs="+", type=int, help="places of captured layers; all without it")
    parser.add_argument("--datasets", nargs="+", default=["captured", "structured"], choices=["captured", "structured"])
    parser.add_argument("--tokens", type=int, default=131072, help="of the structured keys")
    parser.add_argument("--queries", type=int, default=64, help="last positions of each layer that search")
    parser.add_argument("--indexes", nargs="+", help="names, or how they begin")
    parser.add_argument("--plot", type=Path, help="write a figure there")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    kept: list[Row] = []
    show(machine(), keeping(all_rows(options), kept), as_json=options.json)
    if options.plot:
        plot(kept, options.plot)


def all_rows(options: argparse.Namespace) -> Iterator[Row]:
    chosen = families(options.indexes)
    if "captured" in options.datasets:
        captured = Captured.load(options.captured) if options.captured else of_text("manual", 8000)
        captured = captured.only(options.layers)
        yield from rows(f"captured {captured.k.shape[1]}", captured_cases(captured, options.queries), chosen)
    if "structured" in options.datasets:
        cases = structured_cases(options.tokens, options.queries)
        yield from rows(f"structured {options.tokens}", cases, chosen)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
