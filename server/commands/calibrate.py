"""What `keysift doctor --calibrate` does: measures, stores, and shows what it found; and `--forget`."""

from __future__ import annotations

import json

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from keysift.engine.calibration import calibration, crossover
from keysift.engine.calibration.calibration import Calibration
from keysift.engine.config import EngineConfig
from keysift.engine.model.load import load

from .generate import report


def run(config: EngineConfig, *, as_json: bool) -> None:
    """Progress on standard error, the result on standard output."""
    calibration.check_writable()
    model = load(config, report)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("chunks measured", total=None)
        found = crossover.measure(config, model, lambda done, total: bar.update(task, completed=done, total=total))
    kept = calibration.keep(found)
    print_json(found, kept) if as_json else print_table(found, kept)


def delete(*, as_json: bool) -> None:
    """Forget every calibration, and say so."""
    deleted, file = calibration.forget(), str(calibration.store_file())
    text = f"deleted {file}" if deleted else f"nothing is stored in {file}"
    print(json.dumps({"file": file, "deleted": deleted}) if as_json else text)


def longer(found: Calibration, kept: Calibration) -> list[str]:
    """Strategies of which an older crossover stays, because it was measured up to a longer context."""
    return [name for name, each in found.crossovers.items() if kept.crossovers[name] != each]


def print_json(found: Calibration, kept: Calibration) -> None:
    """What was measured, and the names of those of which an older crossover stays."""
    told = {name: {**each.model_dump(), "told": each.told} for name, each in found.crossovers.items()}
    fields = {"file": str(calibration.store_file()), "not_stored": longer(found, kept)}
    print(json.dumps({**fields, **found.model_dump(), "crossovers": told}))


def print_table(found: Calibration, kept: Calibration) -> None:
    """Each strategy against dense, context by context, then from where on it wins and the option that follows."""
    setting, console = found.setting, Console()
    console.print(f"{found.model} in {setting.dtype} on {setting.device} ({setting.backend}), default options:")
    console.print(
        f"how much faster than dense attention a chunk of {setting.prefill_chunk:,} tokens is, by its context"
    )
    console.print(_ratios(found))
    console.print("\nsparse, by its context in tokens")
    console.print(_verdicts(found))
    if older := longer(found, kept):
        print(f"not stored, because an older one goes further (--forget deletes it): {', '.join(older)}")
    print(f"stored in {calibration.store_file()}")


def _ratios(found: Calibration) -> Table:
    """One row for each context: there may be many, and a terminal is longer than it is wide."""
    names = [Column(name, justify="right", overflow="fold") for name in found.crossovers]
    table = Table(Column("context", justify="right", overflow="fold"), *names, box=None, pad_edge=False)
    for chunks in zip(*(each.chunks for each in found.crossovers.values()), strict=True):
        ratios = (f"{chunk.dense_ms / chunk.strategy_ms:.2f}x" for chunk in chunks)
        table.add_row(f"{chunks[0].context:,}", *ratios)
    return table


def _verdicts(found: Calibration) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, each in found.crossovers.items():
        table.add_row(name, each.told, f"dense_below={each.dense_below}")
    return table
