"""Losses of sparse decoding: strategies for tokens over their budgets, against dense, on four different texts.

The embedded model in fp32, teacher-forced; the prompt is dense, the last 256 tokens of each text are decoded, and then
the questions and answers of eight needles after it. *mb*: megabytes of keys and values that a token reads in all
layers, without those read to choose. *coverage* is the strategy's own estimate, *kept* is measured. Readings do not
depend on the machine's speed. They go to a file one by one, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any

from keysift.attention import Strategy, make

from ..lib import cli
from ..lib.decoding import OneOpen, Text
from ..lib.quality import Bench
from ..lib.readings import Row, collect, parse, show

BUDGETS = (256, 512, 1024)
"""Tokens in addition to sinks and window."""
FIXED = {"epsilon": 0.0}
QUEST = {"sink": 64, "window": 256, "dense_layers": 0}
"""With the same zones as the others; as published it has none and loses more."""
CURVES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "page oracle": ("retrieval", [{"index": "flat", "budget": budget, **FIXED} for budget in BUDGETS]),
    "topk": ("topk", [{}]),
    "retrieval": ("retrieval", [{"epsilon": epsilon} for epsilon in (0.02, 0.045, 0.075, 0.09)]),
    "codes, fixed": ("retrieval", [{"budget": budget, **FIXED} for budget in BUDGETS]),
    "ivf": ("retrieval", [{"index": "ivf", "budget": 512, **FIXED}]),
    "graph": ("retrieval", [{"index": "graph", "wait": True, "budget": 512, **FIXED}]),
    "summary": ("retrieval", [{"index": "summary", "budget": 512, **FIXED}]),
    "quest": ("quest", [{"budget": budget, **QUEST} for budget in BUDGETS]),
    "streaming": ("streaming", [{"sink": 128, "window": window} for window in (512, 1024)]),
}
"""Strategy and options of the points of each curve; `dense_below` is 0, other options keep their defaults."""
LONG = 6000
"""Above so many tokens a point takes a quarter of a minute: of each curve only its middle one is measured."""
REFERENCE = "retrieval"
COLUMNS = (
    "density",
    "mb",
    "coverage",
    "kept",
    "kept_min",
    "kl",
    "kl_median",
    "kl_p99",
    "top1",
    "perplexity_change",
    "needle_loss",
    "needle_loss_worst",
)
KEY = ("text", "length", "strategy")
"""Fields that identify a reading, with all options of its strategy."""


def main() -> None:
    parser = cli.parser("benchmarks.quality.decode", __doc__)
    options = parse(parser, CURVES, "decode_quality.jsonl")
    show(list(measure(options)), COLUMNS, list(CURVES), REFERENCE, options.plot)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    asked = list(points(options))
    strategies = [strategy(row) for row in asked]
    bench = functools.cache(lambda: Bench.open(chunk=1024))
    with OneOpen(lambda kind, length: Text.open(bench(), kind, length, strategies)) as text:
        yield from collect(
            asked, options.file, KEY, lambda row: text(row["text"], row["length"]).compare(strategy(row))
        )


def points(options: argparse.Namespace) -> Iterator[Row]:
    for length in options.lengths:
        for text in options.texts:
            for curve in options.curves:
                knobs = CURVES[curve][1]
                for fields in knobs if length <= LONG else knobs[len(knobs) // 2 :][:1]:
                    row = {"text": text, "length": length, "curve": curve, "options": fields}
                    yield {**row, "strategy": repr(strategy(row))}


def strategy(row: Row) -> Strategy:
    return make(CURVES[row["curve"]][0], dense_below=0, **row["options"])


if __name__ == "__main__":
    main()
