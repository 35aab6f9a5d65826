"""What sparse prompts lose: every strategy over its main knob, against dense, on four texts of different kinds.

The embedded model in fp32, teacher-forced; 1,500 scored positions of each text; needle answers asked for behind
it. The whole prompt is sparse, its last rows too, and every strategy has the same 64 sink tokens. Readings do not
depend on the machine's speed. They go to a file one by one, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from quality import Bench
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from texts import KINDS
from timing import machine

from keysift.attention import Strategy, make

Row = dict[str, Any]
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
LONGEST = 8000
"""The model's 8,192 tokens less a question."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8000], help="prompt tokens, multiples of 64")
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument(
        "--chunk", type=int, default=1024, help="prompt tokens of one step, as the engine's prefill_chunk"
    )
    parser.add_argument("--file", type=Path, default=Path("prefill_quality.jsonl"), help="where readings are kept")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (.svg, .png); needs matplotlib")
    options = parser.parse_args()
    if wrong := [length for length in options.lengths if length % 64 or not 2048 <= length <= LONGEST]:
        parser.error(f"--lengths: multiples of 64 from 2048 to {LONGEST}, got {wrong[0]}")
    if options.plot:
        import matplotlib  # noqa: F401  # says at once that it is missing, not after an hour
    rows = list(measure(options))
    console = Console(width=150)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), highlight=False)
    console.print(curves_table(rows), matched_table(rows))
    if options.plot:
        plot(rows, options.plot)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """All readings asked for, from the file where it has them of the same strategy with the same options."""
    known = {key(row): row for row in readings(options.file)}
    asked = list(points(options))
    bench: Bench | None = None
    with _progress() as bar, options.file.open("a") as file:
        task = bar.add_task("", total=len(asked))
        for row in asked:
            bar.update(task, description=f"{row['text']} {row['length']} {row['curve']} {row['options']}")
            if (found := known.get(key(row))) is None:
                bench = bench or Bench.open(options.chunk)
                found = {**row, **bench.compare(row["text"], row["length"], strategy(row)), "date": machine()["date"]}
                file.write(json.dumps(found) + "\n")
                file.flush()
            bar.advance(task)
            yield found


def readings(file: Path) -> Iterator[Row]:
    """What the file holds; a last line that was cut off is skipped."""
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def points(options: argparse.Namespace) -> Iterator[Row]:
    for length in options.lengths:
        for text in options.texts:
            for curve in options.curves if length <= LONG else [name for name in options.curves if name in LONG_CURVES]:
                knobs = CURVES[curve]
                middle = max(len(knobs) // 2 - 1, 0)
                for fields in knobs if length <= LONG else knobs[middle : middle + 2]:
                    row = {"text": text, "length": length, "curve": curve, "options": fields, "chunk": options.chunk}
                    yield {**row, "strategy": repr(strategy(row))}


def key(row: Row) -> str:
    """What a reading depends on, all options of its strategy included. Changed code it cannot see: begin a new file."""
    return json.dumps([row[name] for name in ("text", "length", "strategy", "chunk")])


def strategy(row: Row) -> Strategy:
    name = row["curve"].replace(",", "").split()[0]
    common = {} if name == "streaming" else {"last_rows_dense": 0, "sink": 64}
    return make(name, dense_below=0, **common, **row["options"])


def curves_table(rows: Iterable[Row]) -> Table:
    """Means over the texts, and the text that lost most."""
    groups: dict[tuple[int, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        knobs = " ".join(f"{name}={value}" for name, value in row["options"].items())
        groups[row["length"], row["curve"], knobs].append(row)
    table = Table("tokens", "strategy", "options", *COLUMNS, "worst kl", title="Means over the texts")
    for (length, curve, knobs), group in groups.items():
        means = [
            "-" if group[0][name] is None else f"{statistics.fmean(row[name] for row in group):.4f}" for name in COLUMNS
        ]
        table.add_row(str(length), curve, knobs, *means, f"{max(row['kl'] for row in group):.4f}")
    return table


def matched_table(rows: list[Row]) -> Table:
    """KL of the curves at the densities that sift reached, on log-linear lines through their points."""
    others = [curve for curve in CURVES if curve != "sift"]
    table = Table(
        "tokens",
        "text",
        "density",
        "sift",
        *others,
        title="KL at sift's density, and as a multiple of sift's; - where a curve has no point near",
    )
    for row in (row for row in rows if row["curve"] == "sift"):
        near = [other for other in rows if (other["text"], other["length"]) == (row["text"], row["length"])]
        cells = [at_density([other for other in near if other["curve"] == curve], row["density"]) for curve in others]
        shown = ("-" if cell is None else f"{cell:.4f} ({cell / row['kl']:.2f}x)" for cell in cells)
        table.add_row(str(row["length"]), row["text"], f"{row['density']:.3f}", f"{row['kl']:.4f}", *shown)
    return table


def at_density(curve: list[Row], density: float) -> float | None:
    """KL between the points of a curve; up to 0.02 beyond its ends counts as the end."""
    line = sorted((row["density"], row["kl"]) for row in curve)
    if not line or not line[0][0] - 0.02 <= density <= line[-1][0] + 0.02:
        return None
    return float(np.exp(np.interp(density, [x for x, _ in line], np.log([y for _, y in line]))))


def plot(rows: list[Row], path: Path) -> None:
    """KL against density, one panel for each text and length."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["length"], row["text"]) for row in rows))
    columns = len({text for _, text in panels})
    figure = Figure(figsize=(4 * columns, 3.6 * -(-len(panels) // columns)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(-(-len(panels) // columns), columns, sharey=True)).flatten()
    for axis, (length, text) in zip(axes, panels, strict=False):
        for curve in CURVES:
            line = [row for row in rows if (row["length"], row["text"], row["curve"]) == (length, text, curve)]
            line.sort(key=lambda row: row["density"])
            axis.plot([row["density"] for row in line], [row["kl"] for row in line], "o-", ms=3, lw=1, label=curve)
        axis.set(title=f"{text}, {length} tokens", xlabel="density", ylabel="KL to dense, nats", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=6)
    figure.savefig(path)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip


if __name__ == "__main__":
    main()
