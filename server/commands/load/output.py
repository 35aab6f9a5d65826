"""Results of `keysift load`: profile.json, report.html and the table of the terminal."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from keysift.engine.checked import ready
from keysift.engine.measure.environment import environment
from keysift.engine.measure.profiling.profiler import SCHEMA
from keysift.engine.measure.profiling.report import write_report

from ...interrupts import INTERRUPTED
from ...options import Remote
from ..progress import report
from .run import Load, load


def put_under_load(config: Load, folder: Path, *, as_json: bool) -> int:
    """Run the load, print its results, and write them to `folder`; returns the exit status."""
    ready(folder)
    found = load(config)
    results = _results(config, found)
    (folder / "profile.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    write_report(results, folder / "report.html")
    print(json.dumps(results)) if as_json else _show(found, config)
    for name in ("profile.json", "report.html"):
        report(f"written: {folder / name}")
    return INTERRUPTED if found["interrupted"] else int(not found["completed"])


def _results(config: Load, found: dict[str, Any]) -> dict[str, Any]:
    """The document of `keysift profile`, with ``load`` instead of ``cells``."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": not found["interrupted"],
        "environment": environment(torch.device("cpu")),
        "model": {"name": found["model_id"]},
        "settings": _settings(config, found),
        "load": found,
    }


def _settings(config: Load, found: dict[str, Any]) -> dict[str, Any]:
    """Fields of the load, without the credentials of the connection."""
    fields = config.model_dump(mode="json", exclude=set(Remote.model_fields) - {"address", "priority"})
    return fields | {"request_rate": found["request_rate"]}  # JSON has no infinity


def _show(found: dict[str, Any], config: Load) -> None:
    console = Console()
    console.print(_table(found))
    console.print(
        f"{found['completed']} completed, {found['failed']} failed in {found['duration']:.1f} s; "
        f"{found['request_throughput']:.3f} requests/s, {found['output_throughput']:.1f} tokens/s out"
    )
    if config.goodput:
        good = round(found["request_goodput"] * found["duration"])
        print(
            f"{good} of {config.num_prompts} met {', '.join(config.goodput)}: {found['request_goodput']:.3f} a second"
        )
    for error in dict.fromkeys(each for each in found["errors"] if each):
        print(error)


def _table(found: dict[str, Any]) -> Table:
    table = Table("", *(Column(name, justify="right") for name in ("mean", "median", "p99")), title="milliseconds")
    for metric in ("ttft", "tpot", "itl", "e2el"):
        cells = (found[f"{kind}_{metric}_ms"] for kind in ("mean", "median", "p99"))
        table.add_row(metric.upper(), *("-" if cell is None else f"{cell:,.1f}" for cell in cells))
    return table
