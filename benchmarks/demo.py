"""The main job, end to end: a long document goes to a server over gRPC, the answer streams back.

Starts `keysift serve` on a free loopback port, asks the same question under each strategy, prints a table and stops the
server; then profiles the same strategies on short prompts and prints the path of its report. The exit status is 0 only
if every answer came over the wire and the report was written.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from keysift.engine import Finish, PrefillProgress, SamplingParams, TokenOutput
from keysift.server.client import Client

from .lib import cli
from .lib.document import TOPICS
from .lib.served import keysift, own_environment, serve

STRATEGIES = ("dense", "sift+retrieval")
DOCUMENT = ("assignment", "import", "naming", "class")
ABOUT = "assert"
CHARACTERS = 28_000
"""Length of the other topics, about 6,500 tokens; it differs between Python versions."""
QUESTION = "According to the text above, what does the assert statement do?"
LEAST_TOKENS = 6000
REPORT = Path("keysift-demo")
PROFILE = ("--input-lens", "1000,3000", "--output-len", "12", "--runs", "1", "--warmup", "0", "--attempts", "1")
"""Half a minute: one run of each length, and a second one for the parts of the time."""
console = Console()


def main() -> int:
    cli.parser("benchmarks.demo", __doc__).parse_args()
    document = "\n\n".join(TOPICS[name] for name in DOCUMENT)[:CHARACTERS] + f"\n\n{TOPICS[ABOUT]}"
    console.print(f"Document: CPython's help on {', '.join(DOCUMENT)} and {ABOUT} ({len(document):,} characters)")
    with serve(report=show) as served, Client(served.address) as client:
        console.print(f"Serving {client.info().model} on {served.address}")
        finishes = [ask(client, strategy, document) for strategy in STRATEGIES]
    console.print(table(finishes))
    return 0 if all(complete(finish) for finish in finishes) and profile() else 1


def show(line: str) -> None:
    """One line of the server's log."""
    console.print(line, style="dim", highlight=False, markup=False)


def profile() -> bool:
    """A small `keysift profile` of the same strategies; returns True if it wrote its report."""
    console.rule("keysift profile: where the time goes")
    strategies = [part for name in STRATEGIES for part in ("--strategy", name)]
    command = [str(keysift()), "profile", *strategies, *PROFILE, "--output-dir", str(REPORT)]
    done = subprocess.run(command, env=own_environment(), check=False)
    page = REPORT / "report.html"
    if done.returncode == 0 and page.exists():
        console.print(f"Open {page} in a browser: latency, where the time goes, density, memory.", highlight=False)
    return done.returncode == 0 and page.exists()


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
            if bar.live.is_started:
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
    result = Table(Column("strategy", min_width=14), *columns, title=QUESTION)
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
