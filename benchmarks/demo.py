"""The main job, end to end: a long document goes to a server over gRPC, the answer streams back.

Starts `keysift serve` on a free loopback port, asks the same question under each strategy, prints a table and stops the
server. Exit status 0 only when every answer came over the wire.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from document import TOPICS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from keysift.engine import Finish, PrefillProgress, SamplingParams, TokenOutput
from keysift.server.client import Client

STRATEGIES = ("dense", "streaming")
DOCUMENT = ("assignment", "import", "naming", "class", "assert")
QUESTION = "According to the text above, what does the assert statement do?"
LEAST_TOKENS = 6000
START_SECONDS = 300
console = Console()


def main() -> int:
    document = "\n\n".join(TOPICS[name] for name in DOCUMENT)
    console.print(f"Document: CPython's help on {', '.join(DOCUMENT)} ({len(document):,} characters)")
    with serve() as address, Client(address) as client:
        console.print(f"Serving {client.info().model} on {address}")
        finishes = [ask(client, strategy, document) for strategy in STRATEGIES]
    console.print(table(finishes))
    return 0 if all(complete(finish) for finish in finishes) else 1


@contextmanager
def serve() -> Iterator[str]:
    """`keysift serve` on a free port; yields its address once the model is loaded."""
    keysift = Path(sysconfig.get_path("scripts")) / "keysift"
    server = subprocess.Popen([keysift, "serve", "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        yield wait_until_ready(server)
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    console.print(f"Server stopped with status {server.returncode}")
    if server.returncode:
        raise SystemExit(1)


def wait_until_ready(server: subprocess.Popen[str]) -> str:
    address, deadline = "", time.monotonic() + START_SECONDS
    assert server.stderr is not None
    for line in server.stderr:
        console.print(f"[dim]{line.rstrip()}[/dim]", highlight=False)
        if found := re.search(r"listening on (\S+)", line):
            address = found[1]
        if "ready" in line and address:
            return address
        if time.monotonic() > deadline:
            break
    raise SystemExit("the server did not become ready")


def ask(client: Client, strategy: str, document: str) -> Finish:
    """One question; shows prefill progress and the answer as it streams."""
    console.rule(f"strategy: {strategy}")
    prompt = [{"role": "user", "content": f"{document}\n\n{QUESTION}"}]
    columns = (TextColumn("prefill"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
    bar = Progress(*columns, console=console)
    bar.start()
    task = bar.add_task("prefill", total=None)
    for output in client.generate(prompt, SamplingParams(max_new_tokens=64), strategy=strategy):
        if isinstance(output, PrefillProgress):
            bar.update(task, completed=output.processed, total=output.total)
        elif isinstance(output, TokenOutput):
            bar.stop()
            print(output.text, end="", flush=True)
        elif isinstance(output, Finish):
            print()
            return output
    raise SystemExit("the stream ended without a finish")


def complete(finish: Finish) -> bool:
    return finish.usage.prompt_tokens >= LEAST_TOKENS and finish.usage.completion_tokens > 0


def table(finishes: list[Finish]) -> Table:
    columns = ("prompt tokens", "TTFT s", "TPOT ms", "prefill density", "decode density", "KV read GB")
    result = Table("strategy", *columns, title=QUESTION)
    for column in result.columns[1:]:
        column.justify = "right"
    for finish in finishes:
        sparsity, timings = finish.sparsity, finish.timings
        numbers = (
            f"{finish.usage.prompt_tokens:,}",
            f"{timings.ttft_ms / 1e3:.2f}",
            f"{timings.tpot_ms:.1f}",
            f"{sparsity.prefill_density:.1%}",
            f"{sparsity.decode_density:.1%}",
            f"{sparsity.kv_bytes_read / 1e9:.2f}",
        )
        result.add_row(sparsity.strategy, *numbers)
    return result


if __name__ == "__main__":
    sys.exit(main())
