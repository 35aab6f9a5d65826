"""Work of `keysift calibrate`: measuring, storing and printing crossovers, and deleting them."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Column, Table

from keysift.engine.calibration import calibration, crossover
from keysift.engine.calibration.calibration import Calibration
from keysift.engine.config import EngineConfig
from keysift.engine.model.load import load
from keysift.engine.support import Facts, check

from .progress import count_bar, report


def run(config: EngineConfig, *, as_json: bool) -> None:
    """Measure the crossovers of all prompt strategies, store them, and print them."""
    check(config, Facts(one_process=True))
    calibration.check_writable()
    model = load(config, report)
    with count_bar("chunks measured") as bar:
        measured = crossover.measure(config, model, bar.update)
    stored = calibration.keep(measured)
    print_json(measured, stored) if as_json else print_table(measured, stored)


def delete(*, as_json: bool) -> None:
    """Delete all calibrations, and print the name of their file."""
    deleted, file = calibration.forget(), str(calibration.store_file())
    text = f"deleted {file}" if deleted else f"nothing is stored in {file}"
    print(json.dumps({"file": file, "deleted": deleted}) if as_json else text)


def not_stored(measured: Calibration, stored: Calibration) -> list[str]:
    """Strategies whose older crossover is kept, because it was measured up to a longer context."""
    return [name for name, crossover in measured.crossovers.items() if stored.crossovers[name] != crossover]


def print_json(measured: Calibration, stored: Calibration) -> None:
    """Print the measured calibration as one object, with its file and the strategies that were not stored."""
    crossovers = {name: {**each.model_dump(), "told": each.summary} for name, each in measured.crossovers.items()}
    fields = {"file": str(calibration.store_file()), "not_stored": not_stored(measured, stored)}
    print(json.dumps({**fields, **measured.model_dump(), "crossovers": crossovers}))


def print_table(measured: Calibration, stored: Calibration) -> None:
    """Print the speedup of each strategy over dense by context, then its crossover and the option that follows."""
    setting, console = measured.setting, Console()
    console.print(f"{measured.model} in {setting.dtype} on {setting.device} ({setting.backend}), default options:")
    console.print(f"speedup over dense attention of a chunk of {setting.prefill_chunk:,} tokens, by its context")
    console.print(_ratios(measured))
    console.print("\nsparse, by its context in tokens")
    console.print(_verdicts(measured))
    if names := not_stored(measured, stored):
        print(f"not stored, because an older one goes further (keysift calibrate --forget): {', '.join(names)}")
    print(f"stored in {calibration.store_file()}")


def _ratios(measured: Calibration) -> Table:
    """Speedups, one row for each context: there may be many, and a terminal scrolls down only."""
    names = [Column(name, justify="right", overflow="fold") for name in measured.crossovers]
    table = Table(Column("context", justify="right", overflow="fold"), *names, box=None, pad_edge=False)
    for chunks in zip(*(each.chunks for each in measured.crossovers.values()), strict=True):
        ratios = (f"{chunk.dense_ms / chunk.strategy_ms:.2f}x" for chunk in chunks)
        table.add_row(f"{chunks[0].context:,}", *ratios)
    return table


def _verdicts(measured: Calibration) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, each in measured.crossovers.items():
        table.add_row(name, each.summary, f"dense_below={each.dense_below}")
    return table
