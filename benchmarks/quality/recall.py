"""Recall of sparse attention on a model that is right by construction, for questions anywhere in a prompt.

`lib/recall_model.py` builds it. Every prompt is filler with 24 records. Eight are queried by single tokens in the last
row, sixteen by single tokens, or by quotes of 16, all over the second half. The whole prompt is sparse, its last rows
too, with the options of `quality.prefill`.

With ``--phase decode`` the prompt, all of it filler but for its records, is dense; the single tokens that query them
are decoded after it, with the options of `quality.decode`. Readings do not depend on the machine's speed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from keysift.attention import Dense, Strategy, make
from keysift.attention.token import TokenStrategy

from ..lib import cli
from ..lib.quality import Bench
from ..lib.readings import Row, spelt
from ..lib.recall_model import NAMES, RecallPrompt, recall_prompt, write_recall_model
from ..lib.timing import machine
from . import decode, prefill

Knobs = dict[str, Any]
RUNS = {"single": 1, "quoted": 16}
"""Querying tokens in each place."""
LENGTHS = {"prefill": [4096, 8192], "decode": [1024, 4096, 16384]}


def main() -> None:
    parser = cli.parser("benchmarks.quality.recall", __doc__)
    parser.add_argument("--phase", choices=LENGTHS, default="prefill", help="what is sparse")
    parser.add_argument("--lengths", nargs="+", type=int, help="prompt tokens")
    parser.add_argument("--prompts", type=int, default=3, help="prompts of each kind and length")
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens of one step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print the numbers instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        bench = Bench.open(options.chunk, str(write_recall_model(Path(folder))))
        work, show = (measure, table) if options.phase == "prefill" else (measure_tokens, table_of_tokens)
        rows = list(work(bench, options.lengths or LENGTHS[options.phase], options.prompts))
    if options.json:
        print(json.dumps({"machine": machine(), "chunk": options.chunk, "rows": rows}, indent=1))
    else:
        console = Console(width=130)
        console.print(", ".join(f"{name} {value}" for name, value in machine().items()), highlight=False)
        console.print(show(rows))


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
    for curve, knobs in prefill.CURVES.items():
        for fields in middle(knobs):
            yield f"{curve} {spelt(fields)}", prefill.strategy({"curve": curve, "options": fields})


def strategies_for_tokens() -> Iterator[tuple[str, Strategy]]:
    """Likewise; this model has no layers to spare that would read everything."""
    yield "dense", Dense()
    for curve, (_, knobs) in decode.CURVES.items():
        for fields in middle(knobs):
            chosen = decode.strategy({"curve": curve, "options": fields})
            sparse = replace(chosen, dense_layers=0) if isinstance(chosen, TokenStrategy) else chosen
            yield f"{curve} {spelt(fields)}", sparse


def middle(knobs: list[Knobs]) -> list[Knobs]:
    first = max(len(knobs) // 2 - 1, 0)
    return knobs[first : first + 2]


def recall(bench: Bench, prompt: RecallPrompt, chosen: Strategy) -> tuple[float, float, float]:
    """Shares of right answers at the end and spread over the prompt, and the density."""
    asked = torch.cat((prompt.spread, prompt.end))
    with bench.reader.open([prompt.tokens.tolist()], chosen, 0) as (reading,):
        logs = bench.prefill(reading, asked.tolist())
    spread, end = torch.split(logs.argmax(-1), [len(prompt.spread), len(prompt.end)])
    return prompt.right(prompt.end, end), prompt.right(prompt.spread, spread), reading.sparsity.prefill_density


def measure_tokens(bench: Bench, lengths: list[int], prompts: int) -> Iterator[Row]:
    """A row for each length and strategy: means over the prompts, each of which is prefilled once."""
    named = list(strategies_for_tokens())
    for length in lengths:
        results = [recall_of_tokens(bench, recall_prompt(length, seed), named) for seed in range(prompts)]
        for (name, chosen), found in zip(named, zip(*results, strict=True), strict=True):
            right, density = (statistics.fmean(values) for values in zip(*found, strict=True))
            yield {"tokens": length, "strategy": name, "options": repr(chosen), "right": right, "density": density}


def recall_of_tokens(
    bench: Bench, prompt: RecallPrompt, named: list[tuple[str, Strategy]]
) -> list[tuple[float, float]]:
    """Share of right answers to tokens decoded after the prompt, and density, of each strategy.

    They are the prompt's own, which are filler in it instead, so that each comes for the first time.
    """
    asked, reader = torch.cat((prompt.spread, prompt.end)), bench.reader
    filler = prompt.tokens.index_fill(0, asked, 1 + NAMES).tolist()
    found = []
    with reader.open([filler], Dense(), len(asked), also=[chosen for _, chosen in named]) as (reading,):
        reader.read(reading)
        mark = reading.mark()
        for _, chosen in named:
            reading.sequence.strategy = chosen
            logs = bench.decode(reading, prompt.tokens[asked].tolist())
            found.append((prompt.right(asked, logs.argmax(-1)), reading.sparsity.decode_density))
            reader.rewind(reading, mark)
    return found


def table(rows: list[Row]) -> Table:
    columns = ("tokens", "strategy", "queried at the end", "single, spread", "density", "quoted, spread", "density ")
    shown = Table(*columns, title="Share of queries that recall the right token")
    for row in rows:
        end = (row["single_end"] + row["quoted_end"]) / 2
        shares = (end, *(row[f"{kind}_{what}"] for kind in RUNS for what in ("spread", "density")))
        shown.add_row(str(row["tokens"]), row["strategy"], *(f"{share:.3f}" for share in shares))
    return shown


def table_of_tokens(rows: list[Row]) -> Table:
    shown = Table("tokens", "strategy", "right", "density", title="Share of decoded tokens that recall the right token")
    for row in rows:
        shown.add_row(str(row["tokens"]), row["strategy"], f"{row['right']:.3f}", f"{row['density']:.3f}")
    return shown


if __name__ == "__main__":
    main()
