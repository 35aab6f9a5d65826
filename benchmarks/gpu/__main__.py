"""Checks and tables for a GPU in one run: correctness of the kernels, and their speed against peers.

It checks every op against float64, prints the chosen tables, each followed by its aims, and writes one JSON file, again
after every row. A failure is reported in its row, and the others continue; each table runs in a process of its own, so
that a crash ends no other. Times are medians of events on the device, choosing and writing included; density has the
causal denominator. ``--smoke`` runs all of it on the CPU with tiny sizes, where its numbers mean nothing but that the
script works.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from keysift.engine.version import keysift_version

from ..lib import cli, process
from ..lib.timing import machine
from .clock import Clock
from .rows import Aim, Row, Settings, guarded, show

TABLES = ("correctness", "prefill", "decode", "offload", "model")
REFUSED = "no CUDA GPU here: `--smoke` tries the script on the CPU with tiny sizes"


def main() -> None:
    options = parse()
    if not (options.smoke or torch.cuda.is_available()):
        sys.exit(REFUSED)
    if options.smoke:
        torch.set_num_threads(1)  # work is so small that threads would mostly wait for each other
    report = describe(options)
    if options.apart:
        run_apart(options, report)
    else:
        run_here(options, report)
    sys.exit(1 if failed(report) else 0)


def parse() -> argparse.Namespace:
    parser = cli.parser("benchmarks.gpu", __doc__)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES, metavar="TABLE")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the JSON goes")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of prompts, and of contexts of decoded tokens")
    parser.add_argument("--context", type=int, help="tokens of the offloaded request and of the whole model's")
    parser.add_argument("--chunk", type=int, help="prompt tokens of one step")
    parser.add_argument("--runs", type=int, help="runs to take the median of; none: 5, of small sizes 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: does the script work?")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the GPU")
    parser.add_argument(
        "--apart", action=argparse.BooleanOptionalAction, help="each table in a process of its own; on a GPU it is so"
    )
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if wrong := [n for n in [*(options.lengths or []), options.chunk or 128] if n < 128 or n % 128]:
        parser.error(f"--lengths and --chunk: multiples of 128, got {wrong[0]}")
    if options.apart is None:
        options.apart = not options.smoke and len(options.tables) > 1
    return options


def settings(options: argparse.Namespace) -> Settings:
    device = torch.device("cpu" if options.smoke else "cuda")
    small = options.smoke or options.small
    clock = Clock(device, options.runs or (1 if small else 5), small)
    chosen = (Settings.tiny if small else Settings.full)(clock, options.seed)
    fields: dict[str, Any] = {"lengths": options.lengths, "contexts": options.lengths}
    fields |= {"long": options.context, "chunk": options.chunk}
    return replace(chosen, **{name: value for name, value in fields.items() if value})


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Metadata of the report."""
    on_gpu = not options.smoke
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "seed": options.seed,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "versions": versions(on_gpu),
        "device": device(on_gpu),
        "tables": {},
    }


def commit() -> str:
    """Commit of the source tree, with a + after local changes; outside a checkout the package's version."""
    git = ("git", "-C", str(process.ROOT))
    try:
        head = _output(*git, "rev-parse", "HEAD")
        changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return keysift_version()
    return head + ("+" if changed else "")


def versions(on_gpu: bool) -> dict[str, str | None]:
    names = {name: _version(name) for name in ("torch", "triton", "transformers")}
    cudnn = torch.backends.cudnn.version() if on_gpu else None  # type: ignore[no-untyped-call]
    return {
        "keysift": keysift_version(), "python": sys.version.split()[0], **names,
        "cuda": torch.version.cuda if on_gpu else None, "cudnn": None if cudnn is None else str(cudnn),
        "driver": _driver() if on_gpu else None,
    }  # fmt: skip


def device(on_gpu: bool) -> dict[str, Any]:
    if not on_gpu:
        return {"type": "cpu", "name": machine()["processor"], "capability": None, "memory": None}
    found = torch.cuda.get_device_properties(0)
    return {
        "type": "cuda", "name": found.name, "capability": f"{found.major}.{found.minor}", "memory": found.total_memory,
        "multiprocessors": found.multi_processor_count,
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run_here(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """The tables one after the other; the file is written again after every row."""
    chosen, console = settings(options), Console(width=200)
    if not options.part:
        console.print(heading(report), highlight=False)
    for name in options.tables:
        rows: list[Row] = []
        table = report["tables"][name] = {"rows": rows, "aims": []}
        with progress() as bar:
            task = bar.add_task(name)
            for row in table_rows(name, chosen):
                rows.append(row)
                bar.update(task, description=f"{name}: {row.get('what', '')} done")
                write(report, options.out)
        table["aims"] = [aim.row(on_gpu=not options.smoke) for aim in table_aims(name, rows)]
        write(report, options.out)
        show(name, rows, table["aims"], console)


def table_rows(name: str, chosen: Settings) -> Iterator[Row]:
    def made() -> Iterator[Row]:
        torch.manual_seed(chosen.seed)
        yield from _module(name).rows(chosen)

    yield from guarded({"what": "all of it"}, made())


def table_aims(name: str, rows: list[Row]) -> list[Aim]:
    return list(_module(name).aims(rows))


def _module(table: str) -> ModuleType:
    return import_module(f"benchmarks.gpu.{table}")


def run_apart(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Each table in a process of its own: a kernel that reads where it must not takes the whole process with it."""
    Console(width=200).print(heading(report), highlight=False)
    for name in options.tables:
        part = options.out.with_name(
            f"{options.out.stem}.{name}.json"
        )  # in the same folder, where it survives an interruption
        part.unlink(missing_ok=True)
        code = subprocess.run(command(options, name, part), cwd=process.ROOT).returncode
        report["tables"][name] = read(part, name, code)
        write(report, options.out)
        part.unlink(missing_ok=True)


def command(options: argparse.Namespace, table: str, out: Path) -> list[str]:
    """The command line of this module for one table."""
    words = process.command("benchmarks.gpu", "--tables", table, "--out", out.resolve(), "--part", "--no-apart")
    for name in ("context", "chunk", "runs", "seed"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    words += ["--lengths", *map(str, options.lengths)] if options.lengths else []
    return words + [f"--{name}" for name in ("smoke", "small") if getattr(options, name)]


def read(part: Path, name: str, code: int) -> dict[str, Any]:
    """The table that another process has written, with an error row if the process failed."""
    kept = json.loads(part.read_text())["tables"].get(name) if part.exists() else None
    table: dict[str, Any] = kept or {"rows": [], "aims": []}
    if kept is None or code not in (0, 1):
        table["rows"].append({"what": "all of it", "error": f"its process ended with {code}"})
    return table


def write(report: dict[str, Any], file: Path) -> None:
    """Replace the file atomically, so that readers never see a partial one."""
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(plain(report), indent=1, allow_nan=False) + "\n")
    fresh.replace(file)


def plain(value: Any) -> Any:
    """The value with strings for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def failed(report: dict[str, Any]) -> bool:
    """True if a check of correctness failed or could not run."""
    rows = report["tables"].get("correctness", {"rows": []})["rows"]
    return any(not row.get("passed", False) for row in rows)


def heading(report: dict[str, Any]) -> str:
    known = {**report["device"], **report["versions"], "commit": report["commit"], "date": report["date"]}
    return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


def progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
