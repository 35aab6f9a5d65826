"""What `keysift profile` does: measures, keeps what it finds, and shows it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from keysift.attention import PARTS
from keysift.engine.checked import ready
from keysift.engine.config import EngineConfig
from keysift.engine.errors import InvalidRequest
from keysift.engine.measure.environment import environment
from keysift.engine.measure.profiling.profiler import SCHEMA, Profiler, Results, make_engine
from keysift.engine.measure.profiling.report import write_comparison, write_report
from keysift.engine.measure.profiling.settings import Profile
from keysift.engine.measure.reports.latency import tpot

from ..interrupts import INTERRUPTED
from ..options import Remote
from .generate import report
from .load.run import Load, load

PAGE, COMPARISON = "report.html", "comparison.html"


def profile(settings: Profile, config: EngineConfig, *, compare: Path | None, as_json: bool) -> int:
    """The exit status. Progress on standard error, results on standard output, everything in the output folder."""
    before = None if compare is None else _read(compare)  # a wrong file should not wait for the measuring
    profiler = Profiler(settings, make_engine(settings, config, report))
    ready(settings.output_dir)
    for page in (PAGE, COMPARISON):
        (settings.output_dir / page).unlink(missing_ok=True)  # they would be those of another run
    interrupted = _go(profiler)
    found = profiler.results
    pages = _write_pages(found, before, settings.output_dir)
    print(json.dumps(found)) if as_json else show(found)
    for file in (profiler.results_file, profiler.trace_file, *pages):
        if file.exists():
            report(f"{'interrupted' if interrupted else 'written'}: {file}")
    return INTERRUPTED if interrupted else int(all("error" in cell for cell in found["cells"]))


def put_under_load(config: Load, folder: Path, *, as_json: bool) -> int:
    """The exit status. The load profile of a running server: the same files, with `load` instead of cells."""
    ready(folder)
    found = load(config)
    results = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": not found["interrupted"],
        "environment": environment(torch.device("cpu")),
        "model": {"name": found["model_id"]},
        "settings": _asked(config, found),
        "load": found,
    }
    (folder / "profile.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    write_report(results, folder / PAGE)
    print(json.dumps(results)) if as_json else _show_load(found, config)
    for name in ("profile.json", PAGE):
        report(f"written: {folder / name}")
    return INTERRUPTED if found["interrupted"] else int(not found["completed"])


def _asked(config: Load, found: dict[str, Any]) -> dict[str, Any]:
    """What was sent, and when; how the server was reached is nobody else's business."""
    fields = config.model_dump(mode="json", exclude=set(Remote.model_fields) - {"address"})
    return fields | {"request_rate": found["request_rate"]}  # JSON has no infinity


def _show_load(found: dict[str, Any], config: Load) -> None:
    table = Table("", *(Column(name, justify="right") for name in ("mean", "median", "p99")), title="milliseconds")
    for what in ("ttft", "tpot", "itl", "e2el"):
        cells = (found[f"{kind}_{what}_ms"] for kind in ("mean", "median", "p99"))
        table.add_row(what.upper(), *("-" if cell is None else f"{cell:,.1f}" for cell in cells))
    console = Console()
    console.print(table)
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


def _go(profiler: Profiler) -> bool:
    """Whether it was interrupted; what was found until then is kept."""
    with _progress() as bar:
        task = bar.add_task("profiling", total=None)

        def tell(done: int, total: int, title: str) -> None:
            bar.update(task, completed=done, total=total, description=title)

        try:
            profiler.go(tell)
        except KeyboardInterrupt:
            return True
    return False


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    remaining = (TextColumn("left"), TimeRemainingColumn())
    # As in `evaluation`: the time left is known where a run takes longer than half a minute, too.
    return Progress(*columns, *remaining, console=Console(stderr=True), speed_estimate_period=3600)


def _read(file: Path) -> Results:
    """Raises `InvalidRequest` where it is no result of this command."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidRequest("compare", f"a profile.json, got {str(file)!r} ({error})") from None
    if not isinstance(found, dict) or not str(found.get("schema", "")).startswith("keysift.profile/"):
        raise InvalidRequest("compare", f"a profile.json, got {str(file)!r}, which is something else")
    if "cells" not in found:
        raise InvalidRequest("compare", f"a profile.json of an engine, got {str(file)!r}, which is of a load")
    return found


def _write_pages(found: Results, before: Results | None, folder: Path) -> list[Path]:
    """The report, and the comparison if there is something to compare with."""
    if not found["cells"]:
        return []
    pages = [folder / PAGE]
    write_report(found, pages[0])
    if before is not None:
        pages.append(folder / COMPARISON)
        write_comparison(before, found, pages[1])
    return pages


def show(found: Results) -> None:
    """The machine, the cells, and where their time went."""
    about, model, console = found["environment"], found["model"], Console()
    console.print(
        f"{model['name']} in {model['dtype']}; {about['processor']}, {about['threads']} threads, {about['device']}; "
        f"keysift {about['keysift']}, torch {about['torch']}",
        highlight=False,
    )
    done = [cell for cell in found["cells"] if "error" not in cell]
    if done:
        console.print(_latencies(done))
        console.print("\nshare of the time in percent, prompt/token (as the density above)")
        console.print(_shares(done))
    for cell in found["cells"]:
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
    """Tokens of a prompt, and how many prompts there were at once."""
    count = cell["batch_size"]
    return f"{cell['input_len']:,}" + (f" x {count}" if count > 1 else "")


def _table(*columns: str) -> Table:
    """The strategy's column gives way where a terminal is narrow."""
    numbers = (Column(name, justify="right", no_wrap=True) for name in columns)
    return Table(Column("strategy", overflow="fold"), *numbers, box=None, pad_edge=False)


def _latencies(cells: list[dict[str, Any]]) -> Table:
    table = _table("prompt", "TTFT s", "TPOT ms", "step ms", "tokens/s", "density", "peak MiB")
    for cell in cells:
        table.add_row(
            cell["strategy"],
            _prompts(cell),
            f"{'* ' if cell['disturbed'] else ''}{cell['ttft_ms']['median'] / 1e3:.2f}{_around(cell, 'ttft_ms')}",
            f"{tpot(cell):.1f}{_around(cell, 'tpot_ms')}",
            f"{1e3 * cell['decode_latency']:.1f}",
            f"{cell['output_throughput']:.1f}",
            f"{cell['prefill_density']:.2f}/{cell['decode_density']:.2f}",
            f"{cell['peak_memory_bytes'] / 2**20:,.0f}",
        )
    return table


def _around(cell: dict[str, Any], field: str) -> str:
    """Half of what lies between the fastest and the slowest run, in percent of the median."""
    spread = cell[field]
    return f" ±{50 * (spread['max'] - spread['min']) / spread['median']:.0f}%" if cell["runs"] > 1 else ""


def _shares(cells: list[dict[str, Any]]) -> Table:
    table = _table("prompt", *PARTS)
    for cell in cells:
        each = [cell["shares"][phase] for phase in ("prefill", "decode")]
        percent = [[f"{100 * spent[part] / sum(spent.values()):.0f}" for spent in each] for part in PARTS]
        table.add_row(cell["strategy"], _prompts(cell), *map("/".join, percent))
    return table
