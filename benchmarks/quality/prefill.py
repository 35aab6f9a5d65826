"""Losses of sparse prompts: every strategy over its main option, against dense, on four texts of different kinds.

The embedded model in fp32, teacher-forced; 1,500 scored positions of each text; needle questions after it. The whole
prompt is sparse, its last rows too, and every strategy has the same 64 sink tokens. Readings do not depend on the
machine's speed. They go to a file one by one, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

from keysift.attention import Strategy, make

from ..lib import cli
from ..lib.quality import Bench
from ..lib.readings import Row, collect, parse, show

CURVES: dict[str, list[dict[str, object]]] = {
    "streaming": [{"sink": 64, "window": window} for window in (512, 1024, 2048)],
    "flexprefill": [{"gamma": gamma, "min_budget": 0} for gamma in (0.8, 0.9, 0.95, 0.99)],
    "flexprefill + 1k window": [{"gamma": 0.9, "min_budget": 0, "local": 1088}],
    "sampleattention, 8 %": [{"alpha": 0.95}],
    "sampleattention, 25 %": [{"alpha": alpha, "window_ratio": 0.25} for alpha in (0.9, 0.95)],
    "minference": [{"vertical_size": 512, "slash_size": 1024}],
    "xattention": [{"threshold": threshold} for threshold in (0.8, 0.9)],
    "sift": [{"threshold": threshold} for threshold in (0.002, 0.003, 0.006, 0.012)],
    "oracle": [{"threshold": threshold, "local": 64} for threshold in (0.004, 0.008, 0.016, 0.032)],
}
LONG, LONG_CURVES = 6000, ("streaming", "flexprefill", "sampleattention, 25 %", "sift", "oracle")
"""Above so many tokens a point takes minutes: only these curves are measured, and of each its two middle points."""
COLUMNS = (
    "density",
    "coverage",
    "coverage_min",
    "kl",
    "kl_median",
    "kl_p99",
    "top1",
    "perplexity_change",
    "needle_loss",
)
KEY = ("text", "length", "strategy", "chunk")
"""Fields that identify a reading, with all options of its strategy."""


def main() -> None:
    parser = cli.parser("benchmarks.quality.prefill", __doc__)
    parser.add_argument(
        "--chunk", type=int, default=1024, help="prompt tokens of one step, as the engine's prefill_chunk"
    )
    options = parse(parser, CURVES, "prefill_quality.jsonl")
    show(list(measure(options)), COLUMNS, list(CURVES), "sift", options.plot)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    bench = functools.cache(lambda: Bench.open(options.chunk))
    return collect(
        list(points(options)),
        options.file,
        KEY,
        lambda row: bench().compare(row["text"], row["length"], strategy(row)),
    )


def points(options: argparse.Namespace) -> Iterator[Row]:
    for length in options.lengths:
        for text in options.texts:
            for curve in options.curves if length <= LONG else [name for name in options.curves if name in LONG_CURVES]:
                knobs = CURVES[curve]
                middle = max(len(knobs) // 2 - 1, 0)
                for fields in knobs if length <= LONG else knobs[middle : middle + 2]:
                    row = {"text": text, "length": length, "curve": curve, "options": fields, "chunk": options.chunk}
                    yield {**row, "strategy": repr(strategy(row))}


def strategy(row: Row) -> Strategy:
    name = row["curve"].replace(",", "").split()[0]
    common = {} if name == "streaming" else {"last_rows_dense": 0, "sink": 64}
    return make(name, dense_below=0, **common, **row["options"])


if __name__ == "__main__":
    main()
