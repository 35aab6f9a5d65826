"""What sparse prompts fail to recall: a model that is always right under dense attention, asked in every kind of place.

`recall_model.py` tells how it is built. Every prompt is filler with 24 records. Eight are asked for by single tokens
in the last row, sixteen by single tokens, or by quotes of 16, all over the second half. The whole prompt is sparse, its
last rows too, with the options of `prefill_quality.py`. Readings do not depend on the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from prefill_quality import CURVES, strategy
from quality import Bench
from recall_model import RecallPrompt, recall_prompt, write_recall_model
from rich.console import Console
from rich.table import Table
from timing import machine

from keysift.attention import Dense, Reads, Strategy, make
from keysift.engine.config import EngineConfig
from keysift.engine.model import load

Row = dict[str, Any]
RUNS = {"single": 1, "quoted": 16}
"""Asking tokens in each place."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192], help="prompt tokens")
    parser.add_argument("--prompts", type=int, default=3, help="prompts of each kind and length")
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens of one step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print the numbers instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        config = EngineConfig(model=str(write_recall_model(Path(folder))), dtype="float32", device="cpu")
        rows = list(measure(Bench(load(config, lambda message: None), options.chunk), options.lengths, options.prompts))
    if options.json:
        print(json.dumps({"machine": machine(), "chunk": options.chunk, "rows": rows}, indent=1))
    else:
        console = Console(width=130)
        console.print(", ".join(f"{name} {value}" for name, value in machine().items()), highlight=False)
        console.print(table(rows))


def measure(bench: Bench, lengths: list[int], prompts: int) -> Iterator[Row]:
    """A row for each length and strategy: means over the prompts."""
    for length in lengths:
        for name, chosen in strategies():
            row: Row = {"tokens": length, "strategy": name, "options": repr(chosen)}
            for kind, run in RUNS.items():
                found = [recall(bench, recall_prompt(length, seed, run=run), chosen) for seed in range(prompts)]
                end, spread, density = (statistics.fmean(values) for values in zip(*found, strict=True))
                row |= {f"{kind}_spread": spread, f"{kind}_end": end, f"{kind}_density": density}
            yield row


def strategies() -> Iterator[tuple[str, Strategy]]:
    """Dense, and of every curve its two middle points."""
    yield "dense", Dense()
    yield "ashape window=1024", make("ashape", dense_below=0, last_rows_dense=0, sink=64, local=1024)
    for curve, knobs in CURVES.items():
        middle = max(len(knobs) // 2 - 1, 0)
        for fields in knobs[middle : middle + 2]:
            shown = " ".join(f"{name}={value}" for name, value in fields.items())
            yield f"{curve} {shown}", strategy({"curve": curve, "options": fields})


@torch.inference_mode()
def recall(bench: Bench, prompt: RecallPrompt, chosen: Strategy) -> tuple[float, float, float]:
    """Shares of right answers at the end and spread over the prompt, and the density."""
    asked = torch.cat((prompt.spread, prompt.end))
    with bench.sequence(len(prompt.tokens)) as (cache, sequence):
        logs, steps = bench.prefill(cache, sequence, prompt.tokens, asked, chosen)
    spread, end = torch.split(logs.argmax(-1), [len(prompt.spread), len(prompt.end)])
    density = sum((telemetry.reads()[0] for telemetry in steps), Reads()).density
    return prompt.right(prompt.end, end), prompt.right(prompt.spread, spread), density


def table(rows: list[Row]) -> Table:
    columns = ("tokens", "strategy", "asked at the end", "single, spread", "density", "quoted, spread", "density ")
    shown = Table(*columns, title="Share of queries that recall the right token")
    for row in rows:
        end = (row["single_end"] + row["quoted_end"]) / 2
        shares = (end, *(row[f"{kind}_{what}"] for kind in RUNS for what in ("spread", "density")))
        shown.add_row(str(row["tokens"]), row["strategy"], *(f"{share:.3f}" for share in shares))
    return shown


if __name__ == "__main__":
    main()
