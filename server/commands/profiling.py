"""Work of `keysift profile`: measuring, the files of the output folder, and the tables of the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from keysift.attention import PARTS
from keysift.engine.checked import ready
from keysift.engine.config import EngineConfig
from keysift.engine.errors import InvalidRequest
from keysift.engine.measure.profiling.profiler import Profiler, Results, make_engine
from keysift.engine.measure.profiling.report import write_comparison, write_report
from keysift.engine.measure.profiling.settings import Profile
from keysift.engine.measure.reports.latency import tpot

from ..interrupts import INTERRUPTED
from .progress import interrupted, report

PAGE, COMPARISON = "report.html", "comparison.html"


def profile(settings: Profile, config: EngineConfig, *, compare: Path | None, as_json: bool) -> int:
    """Measure, print the results, and write the output folder; returns the exit status."""
    before = None if compare is None else _read(compare)  # a wrong file fails before the measuring
    profiler = Profiler(settings, make_engine(settings, config, report))
    ready(settings.output_dir)
    for page in (PAGE, COMPARISON):
        (settings.output_dir / page).unlink(missing_ok=True)  # of an earlier run
    stopped = interrupted("profiling", profiler.go)
    results = profiler.results
    pages = _write_pages(results, before, settings.output_dir)
    print(json.dumps(results)) if as_json else show(results)
    for file in (profiler.results_file, profiler.trace_file, *pages):
        if file.exists():
            report(f"{'interrupted' if stopped else 'written'}: {file}")
    return INTERRUPTED if stopped else int(all("error" in cell for cell in results["cells"]))


def _read(file: Path) -> Results:
    """Results of an earlier run; raises `InvalidRequest` for any other file."""
    try:
        results = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidRequest("compare", f"a profile.json, got {str(file)!r} ({error})") from None
    if not isinstance(results, dict) or not str(results.get("schema", "")).startswith("keysift.profile/"):
        raise InvalidRequest("compare", f"a profile.json, got {str(file)!r}, which is another format")
    if "cells" not in results:
        raise InvalidRequest("compare", f"a profile.json of an engine, got {str(file)!r}, which is of a load")
    return results


def _write_pages(results: Results, before: Results | None, folder: Path) -> list[Path]:
    """Write the report, and the comparison with `before`; returns their paths."""
    if not results["cells"]:
        return []
    pages = [folder / PAGE]
    write_report(results, pages[0])
    if before is not None:
        pages.append(folder / COMPARISON)
        write_comparison(before, results, pages[1])
    return pages


def show(results: Results) -> None:
    """Print the machine, the latency of each cell, and the share of each part of a step."""
    about, model, console = results["environment"], results["model"], Console()
    console.print(
        f"{model['name']} in {model['dtype']}; {about['processor']}, {about['threads']} threads, {about['device']}; "
        f"keysift {about['keysift']}, torch {about['torch']}",
        highlight=False,
    )
    done = [cell for cell in results["cells"] if "error" not in cell]
    if done:
        console.print(_latencies(done))
        console.print("\nshare of the time in percent, prompt/token (as the density above)")
        console.print(_shares(done))
    for cell in results["cells"]:
        if "error" in cell:
            print(f"{_title(cell)}: {cell['error']}")
    for cell in done:
        if cell["disturbed"]:
            print(
                f"{_title(cell)}: disturbed; it had {cell['cpu_share']:.0%} of its threads' time, others "
                f"{cell['others_share']:.0%} of the cores"
            )


def _title(cell: dict[str, Any]) -> str:
    return f"{cell['strategy']}, {_prompts(cell)} tokens"


def _prompts(cell: dict[str, Any]) -> str:
    """Tokens of a prompt, x prompts at once."""
    count = cell["batch_size"]
    return f"{cell['input_len']:,}" + (f" x {count}" if count > 1 else "")


def _table(*columns: str) -> Table:
    """Table whose strategy column folds on a narrow terminal."""
    numbers = (Column(name, justify="right", no_wrap=True) for name in columns)
    return Table(Column("strategy", overflow="fold"), *numbers, box=None, pad_edge=False)


def _latencies(cells: list[dict[str, Any]]) -> Table:
    table = _table("prompt", "TTFT s", "TPOT ms", "step ms", "tokens/s", "density", "peak MiB")
    for cell in cells:
        table.add_row(
            cell["strategy"],
            _prompts(cell),
            f"{'* ' if cell['disturbed'] else ''}{cell['ttft_ms']['median'] / 1e3:.2f}{_half_range(cell, 'ttft_ms')}",
            f"{tpot(cell):.1f}{_half_range(cell, 'tpot_ms')}",
            f"{1e3 * cell['decode_latency']:.1f}",
            f"{cell['output_throughput']:.1f}",
            f"{cell['prefill_density']:.2f}/{cell['decode_density']:.2f}",
            f"{cell['peak_memory_bytes'] / 2**20:,.0f}",
        )
    return table


def _half_range(cell: dict[str, Any], field: str) -> str:
    """Half of the distance between the fastest and the slowest run, in percent of the median."""
    runs = cell[field]
    return f" ±{50 * (runs['max'] - runs['min']) / runs['median']:.0f}%" if cell["runs"] > 1 else ""


def _shares(cells: list[dict[str, Any]]) -> Table:
    table = _table("prompt", *PARTS)
    for cell in cells:
        phases = [cell["shares"][phase] for phase in ("prefill", "decode")]
        percent = [[f"{100 * times[part] / sum(times.values()):.0f}" for times in phases] for part in PARTS]
        table.add_row(cell["strategy"], _prompts(cell), *map("/".join, percent))
    return table
