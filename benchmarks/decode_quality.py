"""What sparse decoding loses: strategies for tokens over their budgets, against dense, on four different texts.

The embedded model in fp32, teacher-forced; the prompt is dense, the last 256 tokens of each text are decoded, and then
eight needles are asked for behind it, question and answer decoded as well. *mb*: megabytes of keys and values that a
token reads in all layers; what choosing reads is not among them. *coverage* is what a strategy tells of itself, *kept*
the truth. Readings do not depend on the machine's speed. They go to a file one by one, so that a run that was cut off
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any

from decoding import Text
from quality import Bench
from readings import Row, collect, parse, show

from keysift.attention import Strategy, make

BUDGETS = (128, 256, 512, 1024)
"""Tokens besides sinks and window."""
EXACT = {"epsilon": 0.0}
"""The whole budget is spent."""
CURVES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "topk": ("topk", [{"top_k": keys} for keys in (50, 100, 200)]),
    "oracle": ("retrieval", [{"index": "flat", "budget": budget, **EXACT} for budget in BUDGETS]),
    "oracle, tail": ("retrieval", [{"index": "flat", "budget": budget, "tail": "mean", **EXACT} for budget in BUDGETS]),
    "codes": ("retrieval", [{"index": "codes", "budget": budget, **EXACT} for budget in BUDGETS]),
    "codes, tail": ("retrieval", [{"index": "codes", "budget": budget, "tail": "mean", **EXACT} for budget in BUDGETS]),
    "codes, epsilon": (
        "retrieval",
        [{"index": "codes", "budget": 1024, "epsilon": epsilon} for epsilon in (0.02, 0.045, 0.09, 0.18)],
    ),
    "bound": ("retrieval", [{"index": "bound", "budget": budget, **EXACT} for budget in BUDGETS]),
    "quest": ("quest", [{"budget": budget} for budget in (256, 512, 1024, 2048)]),
    "mean": ("retrieval", [{"index": "mean", "budget": budget, **EXACT} for budget in BUDGETS]),
    "streaming": ("streaming", [{"sink": 64, "window": 256 + budget} for budget in BUDGETS]),
}
"""Of each curve the strategy, and the options of its points; others keep their defaults, but nothing falls back."""
REFERENCE = "codes"
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
"""What a reading depends on, all options of its strategy included."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = parse(parser, CURVES, "decode_quality.jsonl")
    show(list(measure(options)), COLUMNS, list(CURVES), REFERENCE, options.plot)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    asked = list(points(options))
    bench = functools.cache(lambda: Bench.open(chunk=1024))

    @functools.lru_cache(maxsize=1)  # a text of 8,000 tokens is half a gigabyte
    def text(kind: str, length: int) -> Text:
        return Text.open(bench(), kind, length, [strategy(row) for row in asked])

    return collect(asked, options.file, KEY, lambda row: text(row["text"], row["length"]).compare(strategy(row)))


def points(options: argparse.Namespace) -> Iterator[Row]:
    for length in options.lengths:
        for text in options.texts:
            for curve in options.curves:
                for fields in CURVES[curve][1]:
                    row = {"text": text, "length": length, "curve": curve, "options": fields}
                    yield {**row, "strategy": repr(strategy(row))}


def strategy(row: Row) -> Strategy:
    return make(CURVES[row["curve"]][0], dense_below=0, **row["options"])


if __name__ == "__main__":
    main()
