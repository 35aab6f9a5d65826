"""Savings and losses of a locality bound: bytes moved per token, KL and needles, over budgets and bounds.

The embedded model in fp32 over an offloaded cache, whose pool holds a part of the context (a quarter by default). The
prompt is dense; the last 256 tokens of each text are decoded one by one under a strategy, teacher-forced, then the
questions and answers of eight needles after it, each from the text's end. *moved*: megabytes that a token fetched from
the backing store, a mean over the last 224 of them; *bound*: what ``m_max`` pages and the page border allow; *overlap*:
share of the pages that the token before had read too; *bound_exceeded*: share of the choices that let in more than
``m_max``. KL is against dense. Bytes and readings do not depend on the machine's speed. They go to a file one by one,
so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from keysift.attention import Dense, Strategy, make
from keysift.engine import Engine
from keysift.engine.execution.runner import Runner
from keysift.engine.measure.evaluation.reader import Mark, Reader, Reading
from keysift.kvcache import HostStore, OffloadTier, PagedCache, PoolSize, Traffic

from ..lib import cli
from ..lib.decoding import SCORED, OneOpen, Text
from ..lib.quality import ROOM, Bench, Outcome
from ..lib.readings import Row, collect, curves_table, parse
from ..lib.timing import machine

COLD = 32
"""Tokens after which the pool is warm, and traffic is counted."""
BUDGETS = (512, 1024, 1664)
"""Tokens in addition to 64 sinks and a window of 256; with them the last one fills a quarter of 8,000 tokens."""
NOSA = {"dense_below": 0}
CURVES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "no rule": ("retrieval", [{"dense_below": 0, "epsilon": 0.0, "budget": budget} for budget in BUDGETS]),
    **{
        f"m_max {most}": ("nosa", [{**NOSA, "m_max": most, "budget": budget} for budget in BUDGETS])
        for most in (1, 2, 4, 8)
    },
    "m_max 4, asks for 1,024": ("nosa", [{**NOSA, "m_max": 4, "queried": 1024, "budget": b} for b in BUDGETS[1:]]),
    "m_max 4, drops": ("nosa", [{**NOSA, "m_max": 4, "refused": "drop", "budget": BUDGETS[-1]}]),
}
COLUMNS = (
    "density",
    "moved",
    "bound",
    "overlap",
    "bound_exceeded",
    "kl",
    "kl_p99",
    "top1",
    "needle_loss",
    "needle_loss_worst",
)
KEY = ("text", "length", "strategy")


def main() -> None:
    parser = cli.parser("benchmarks.quality.locality", __doc__)
    parser.add_argument("--pool", type=float, default=0.25, help="share of the context that the pool's slots hold")
    options = parse(parser, CURVES, "locality.jsonl")
    rows = list(measure(options))
    console = Console(width=180)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), highlight=False)
    console.print(curves_table(rows, COLUMNS))
    if options.plot:
        plot(rows, options.plot)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    bench = functools.cache(lambda: Bench.open(chunk=1024))
    asked = list(points(options))
    with OneOpen(lambda kind, length: Offloaded.open(bench(), kind, length, options.pool)) as text:
        yield from collect(
            asked, options.file, KEY, lambda row: text(row["text"], row["length"]).compare(strategy(row))
        )


def points(options: argparse.Namespace) -> Iterator[Row]:
    for length in options.lengths:
        for kind in options.texts:
            for curve in options.curves:
                for fields in CURVES[curve][1]:
                    row = {"text": kind, "length": length, "curve": curve, "options": fields}
                    yield {**row, "strategy": repr(strategy(row))}


def strategy(row: Row) -> Strategy:
    return make(CURVES[row["curve"]][0], **row["options"])


@dataclass(slots=True)
class Offloaded:
    """A text in an offloaded cache, prefilled densely but for its last tokens, which are decoded under any strategy."""

    bench: Bench
    tokens: list[int]
    reading: Reading
    start: Mark
    dense: Outcome

    @classmethod
    @contextmanager
    def open(cls, bench: Bench, kind: str, length: int, pool: float) -> Iterator[Offloaded]:
        with Text.open(bench, kind, length, []) as resident:
            tokens, dense = resident.tokens, resident.dense
        away = Bench(Reader(offloaded(bench.reader.engine, length + ROOM, pool)))
        with away.reader.open([tokens[:-SCORED]], Dense(), SCORED + ROOM) as (reading,):
            away.reader.read(reading)
            yield cls(away, tokens, reading, reading.mark(), dense)

    def compare(self, strategy: Strategy) -> dict[str, float | None]:
        """Decode the last tokens, then each needle's question and answer, all of them one by one; against dense."""
        bench, reading, cache = self.bench, self.reading, self.bench.reader.engine.cache
        reading.sequence.strategy = strategy
        found = [bench.decode(reading, self.tokens[-SCORED : COLD - SCORED])]
        before = cache.tier.traffic
        found.append(bench.decode(reading, self.tokens[COLD - SCORED :]))
        facts, end, history = self.facts(strategy, cache.tier.traffic - before), reading.mark(), cache.recent

        def ask(question: list[int], answer: list[int]) -> Tensor:
            cache.recent = copy.deepcopy(history)
            return bench.ask_decoded(reading, end, question, answer)

        outcome = Outcome(torch.cat(found), bench.answers(ask), facts)
        bench.reader.rewind(reading, self.start)
        return outcome.against(self.dense, torch.tensor(self.tokens[1 - SCORED :]))

    def facts(self, strategy: Strategy, traffic: Traffic) -> dict[str, float | None]:
        """Traffic of the tokens after `COLD` ones; densities and overlaps of all `SCORED`."""
        spec, locality = self.bench.reader.engine.cache.spec, self.reading.sequence.locality
        most = getattr(strategy, "m_max", None)
        piece = spec.num_layers * spec.num_kv_heads * spec.read_bytes / 1e6
        return {
            "density": self.reading.decode_density,
            "moved": traffic.fetched / (SCORED - COLD) / 1e6,
            "bound": None if most is None else (most + 1) * piece,
            "overlap": locality.mean_overlap,
            "bound_exceeded": locality.bound_exceeded_share,
        }


def offloaded(engine: Engine, length: int, pool: float) -> Engine:
    """The engine over an offloaded cache: its pool holds a share of the context, its stage all of it, for prompts."""
    spec, device = engine.cache.spec, torch.device("cpu")
    pages = spec.pages_for(length)
    size = PoolSize(slots=int(pool * pages), staged=pages, tails=1)
    tier = OffloadTier(spec, pages, HostStore(spec, device), size, device)
    other = copy.copy(engine)
    other.cache = PagedCache(spec, pages, max_sequences=1, max_len=length, tier=tier)
    other.runner = Runner(engine.model, other.cache, engine.config)
    return other


def plot(rows: list[Row], path: Path) -> None:
    """Megabytes moved, and KL, against the budget, a line for each bound; dotted: what the bound allows."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((row["text"], row["length"]) for row in rows))
    figure = Figure(figsize=(4.2 * len(kinds), 6.4), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")
    for column, (kind, length) in enumerate(kinds):
        for curve in CURVES:
            line = [row for row in rows if (row["text"], row["length"], row["curve"]) == (kind, length, curve)]
            budgets = [row["options"]["budget"] for row in line]
            (drawn,) = axes[0, column].plot(budgets, [row["moved"] for row in line], "o-", ms=3, lw=1, label=curve)
            axes[1, column].plot(budgets, [row["kl"] for row in line], "o-", ms=3, lw=1, label=curve)
            if line and line[0]["bound"] is not None:
                axes[0, column].plot(budgets, [row["bound"] for row in line], ":", lw=1, color=drawn.get_color())
        axes[0, column].set(title=f"{kind}, {length} tokens", yscale="log", ylabel="MB fetched for a token")
        axes[1, column].set(xlabel="budget, tokens", yscale="log", ylabel="KL to dense, nats")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
