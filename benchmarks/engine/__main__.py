"""Keysift's engine against transformers' `generate` on the embedded model: TTFT, TPOT and peak memory.

Each side runs in a process of its own, the sides of one length one after the other; prompts are real text (CPython's
documentation). Medians; a run during which other processes took more than 5 % of the cores is done again. Ratios are
against the better of transformers' sides, or against the first side where none of them runs. Prompts beyond the model's
8,192 tokens run with its rotary embedding stretched (YaRN), for their speed only: the text that it generates there is
worthless.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from ..lib import cli
from ..lib.timing import machine
from .sides import run_apart, run_side

SIDES = ("transformers float32", "transformers bfloat16", "keysift dense")


def main() -> None:
    parser = cli.parser("benchmarks.engine", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000, 8000], help="prompt tokens")
    parser.add_argument("--new", type=int, default=24, help="tokens to generate")
    parser.add_argument("--runs", type=int, default=3, help="undisturbed runs to take the median of")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--sides",
        nargs="+",
        default=list(SIDES),
        help="'transformers DTYPE', or 'keysift STRATEGY' in bfloat16; ' int8' after it for weights in 8 bits",
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.lengths[0], options.new, options.runs)))
        return
    rows = [run_apart(side, length, options) for length in options.lengths for side in options.sides]
    report = {"machine": machine(), "new_tokens": options.new, "runs": options.runs, "rows": rows}
    print(json.dumps(report, indent=1)) if options.json else Console(width=140).print(table(report))


def table(report: dict[str, Any]) -> Table:
    title = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    columns = ("density", "TTFT s", "TTFT ratio", "TPOT ms", "TPOT ratio", "peak memory MB", "memory ratio")
    result = Table("prompt", "side", *columns, title=f"{title}; {report['new_tokens']} new tokens")
    for row in report["rows"]:
        same = [other for other in report["rows"] if other["prompt_tokens"] == row["prompt_tokens"]]
        peers = [other for other in same if other["side"].startswith("transformers")] or same[:1]
        cells = [f"{row['prompt_tokens']:,}", row["side"], f"{row['density']:.3f}"]
        for key, digits in (("ttft_s", 2), ("tpot_ms", 1), ("peak_memory_mb", 0)):
            best = min(peer[key] for peer in peers)
            cells += [f"{row[key]:.{digits}f}", f"{row[key] / best:.2f}x"]
        result.add_row(*cells)
    return result


if __name__ == "__main__":
    main()
