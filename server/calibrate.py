"""What `keysift doctor --calibrate` does: measures, stores, and shows what it found."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from keysift.engine import crossover
from keysift.engine.calibration import Calibration, keep
from keysift.engine.config import EngineConfig
from keysift.engine.model import load

from .generate import report


def run(config: EngineConfig, *, as_json: bool) -> None:
    """Progress on standard error, the result on standard output."""
    model = load(config, report)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("chunks measured", total=None)
        found = crossover.measure(config, model, lambda done, total: bar.update(task, completed=done, total=total))
    file = keep(found)
    print_json(found, file) if as_json else print_table(found, file)


def print_json(found: Calibration, file: Path) -> None:
    print(json.dumps({"file": str(file), **found.model_dump()}))


def print_table(found: Calibration, file: Path) -> None:
    """Each strategy against dense, chunk by chunk, the context from which on it wins, and the option that follows."""
    contexts = [f"{chunk.context:,}" for chunk in next(iter(found.crossovers.values())).chunks]
    heads = ("strategy", *contexts, "from", "dense_below")
    table = Table(*(Column(head, no_wrap=True) for head in heads), box=None, pad_edge=False)
    for name, each in found.crossovers.items():
        ratios = (f"{chunk.dense_ms / chunk.strategy_ms:.2f}x" for chunk in each.chunks)
        start = "nowhere" if each.wins_from is None else f"{each.wins_from:,}"
        table.add_row(name, *ratios, start, f"{each.dense_below:,}")
    setting = found.setting
    console = Console()
    console.print(f"{found.model} in {setting.dtype} on {setting.device}: how much faster than dense attention a chunk")
    console.print(f"of {setting.prefill_chunk:,} tokens is at the end of so many tokens of context, in default options")
    console.print(table)
    console.print(f"stored in {file}", soft_wrap=True)
