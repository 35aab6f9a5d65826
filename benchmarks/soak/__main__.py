"""Servers under mixed load: memory over time, latency by fifths of the time, errors, answers that must not change.

Starts `keysift serve` with the embedded model, once with all pages in memory (resident) and once over a file in
``--folder`` with a small pool (offloaded), both at once. The clients share them and send requests one after the other:
every registered strategy as it comes and choosing at every length, every index, every pair; short, medium and long
prompts, with beginnings that others share or of their own; sampling, stop strings, salts, priorities, aborts, dropped
streams and deadlines. What a client sends depends on ``--seed`` alone. Each server is asked a golden request now and
then, whose tokens must stay those of the first answer, whatever else runs.

Criteria: RSS of the last half within 2 % (medians of tenths of the time), the last fifth's p99 of TTFT and TPOT at most
1.2 times the second's, no error, no other golden answer. The exit status is 0 only if all are met.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from subprocess import Popen
from threading import Event
from typing import Any

import psutil
from rich import box
from rich.console import Console

from keysift.engine.measure.evaluation.texts import documentation
from keysift.server.client import Client
from keysift.server.commands.load.prompts import token_size

from ..lib import cli
from ..lib.served import Served, serve
from ..lib.timing import machine
from .load import GOLDEN, Golden, Reading, run_client, supported
from .memory import Sample, sample
from .mix import orders, recipes
from .summary import summarise
from .tables import show

TIERS = ("resident", "offloaded")
LENGTHS = (64, 512, 2048)
GOLDEN_TOKENS = 384
"""Tokens of the golden request's prompt, at most half of the model's."""
WIDTH = 150
console = Console(stderr=True)


def main() -> int:
    options = parse()
    record = soak(options)
    show(record, Console(width=WIDTH))
    return 0 if all(verdict["met"] for verdict in record["verdicts"]) else 1


def parse() -> argparse.Namespace:
    parser = cli.parser("benchmarks.soak", __doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="duration of the load")
    parser.add_argument("--clients", type=int, default=8, help="clients of all servers together")
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=TIERS)
    parser.add_argument("--model", help="as for `keysift serve`; none: the embedded model")
    parser.add_argument(
        "--lengths", type=int, nargs=3, default=LENGTHS, help="most tokens of short, medium, long prompts"
    )
    parser.add_argument("--kv-memory", default="256MiB", help="memory of the resident pages")
    parser.add_argument("--kv-pool", default="96MiB", help="memory of the offloaded server's pool")
    parser.add_argument("--kv-offload-memory", default="512MiB", help="bytes of its backing store")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="folder of its backing file")
    parser.add_argument("--sample", type=float, default=5.0, help="seconds between two samples of memory")
    parser.add_argument("--golden", type=float, default=10.0, help="seconds between two golden requests of a server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("keysift-soak"), help="gets soak.json and soak.md")
    options = parser.parse_args()
    if options.clients < len(options.tiers):
        parser.error(f"--clients: at least one for each of {len(options.tiers)} tiers, got {options.clients}")
    return options


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Run the load; the record is written before the servers stop, so that a failing stop loses nothing."""
    with ExitStack() as stack:
        servers = {tier: stack.enter_context(serve(*words(tier, options), report=show_log)) for tier in options.tiers}
        command = shlex.join(["python", "-m", "benchmarks.soak", *sys.argv[1:]])
        record = {"machine": machine(), "command": command, **Soak(servers, options).run()}
        write(record, options.output_dir)
    return record


def write(record: dict[str, Any], folder: Path) -> None:
    """The record as JSON, and its tables as markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "soak.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    with (folder / "soak.md").open("w", encoding="utf-8") as file:
        show(record, Console(file=file, width=WIDTH), box.MARKDOWN)
    console.print(f"written: {folder}/soak.json, {folder}/soak.md", highlight=False)


def words(tier: str, options: argparse.Namespace) -> list[str]:
    """Arguments of `keysift serve`."""
    model = [options.model] if options.model else []
    if tier == "resident":
        return [*model, "--kv-memory", options.kv_memory]
    memory = ["--kv-memory", options.kv_pool, "--kv-offload-memory", options.kv_offload_memory]
    return [*model, "--kv-offload", str(options.folder), *memory]


def show_log(line: str) -> None:
    console.print(line, style="dim", highlight=False, markup=False)


class Soak:
    """One run over servers that are ready."""

    def __init__(self, servers: dict[str, Served], options: argparse.Namespace) -> None:
        self._servers = servers
        self._options = options
        self._stop = Event()
        self._readings: list[Reading] = []
        self._samples: dict[str, list[Sample]] = {name: [] for name in servers}
        self._golden = Golden("")

    def run(self) -> dict[str, Any]:
        """The load, and its summary with all samples."""
        with ExitStack() as stack:
            clients = {name: stack.enter_context(Client(each.address)) for name, each in self._servers.items()}
            work = self._prepare(clients, lambda name: stack.enter_context(Client(self._servers[name].address)))
            self._began = time.monotonic()
            with ThreadPoolExecutor(len(work)) as pool:
                running = [pool.submit(each) for each in work]
                self._watch()
            for each in running:
                each.result()
        summary = summarise(self._samples, self._readings, self._golden, time.monotonic() - self._began)
        return summary | {"samples": {name: [asdict(one) for one in found] for name, found in self._samples.items()}}

    def _prepare(self, clients: dict[str, Client], connect: Callable[[str], Client]) -> list[Callable[[], None]]:
        """Work that runs at once: the clients in turn over the servers, and each server's golden requests."""
        length = next(iter(clients.values())).info().max_model_len
        size = token_size(next(iter(clients.values())), length)
        self._golden.prompt = documentation()[: int(size * min(GOLDEN_TOKENS, length // 2))]
        mixes = {}
        for name, client in clients.items():
            mixes[name] = list(supported(client, recipes()))
            console.print(f"{name}: {len(mixes[name])} of {len(recipes())} strategies fit", highlight=False)
            for recipe in GOLDEN:
                self._golden.ask(client, recipe)
        names, options = list(clients), self._options
        work: list[Callable[[], None]] = []
        for number in range(options.clients):
            name = names[number % len(names)]
            drawn = orders(mixes[name], options.lengths, size, options.seed * 1000 + number)
            work.append(partial(self._client, name, connect(name), drawn))
        return [*work, *(partial(self._ask_golden, client) for client in clients.values())]

    def _client(self, name: str, client: Client, drawn: Iterator[Any]) -> None:
        self._readings.extend(run_client(name, client, drawn, self._began, self._stop))

    def _ask_golden(self, client: Client) -> None:
        number = 0
        while not self._stop.wait(self._options.golden):
            self._golden.ask(client, GOLDEN[number % len(GOLDEN)])
            number += 1

    def _watch(self) -> None:
        """Sample until the time is over or a server has ended."""
        end = self._began + 60 * self._options.minutes
        while time.monotonic() < end and all(alive(each.process) for each in self._servers.values()):
            for name, each in self._servers.items():
                self._samples[name].append(sample(each.process.pid, time.monotonic() - self._began))
            self._stop.wait(min(self._options.sample, max(end - time.monotonic(), 0)))
        self._stop.set()


def alive(process: Popen[str]) -> bool:
    return process.poll() is None and psutil.pid_exists(process.pid)


if __name__ == "__main__":
    sys.exit(main())
