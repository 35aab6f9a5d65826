"""Keysift beside its peers on a CPU: transformers, llama.cpp and OpenVINO GenAI, in one run.

The same model (the embedded one), the same real prompt as token ids, the same cores, greedy, a fixed number of tokens:
TTFT, TPOT (median over tokens and runs) and peak memory, each side in a process of its own, one after the other.
llama.cpp and OpenVINO GenAI live in virtual environments that the first run makes in the user's cache folder (llama.cpp
is compiled, which takes a while); one that cannot be made is named, and the others still run. Both read the package's
own GGUF, whose weights all sides have; llama.cpp may also read types that are made from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from document import tokens
from rich.console import Console
from rich.table import Table
from timing import QUIET, machine

import engine
from keysift.attention.native.cores import num_threads
from keysift.engine.config import EngineConfig
from keysift.engine.embedded import cache_folder, package_file
from keysift.engine.model import load

FOLDER = Path(__file__).parent
PACKAGES = {"llama.cpp": "llama-cpp-python==0.3.36", "openvino": "openvino-genai==2026.4.1.0"}
SCRIPTS = {"llama.cpp": "peer_llama_cpp.py", "openvino": "peer_openvino.py"}
SIDES = (
    "transformers float32",
    "transformers bfloat16",
    "llama.cpp Q4_1",
    "llama.cpp Q8_0",
    "openvino stateful",
    "openvino paged",
    "keysift dense",
    "keysift sift+retrieval",
    "keysift sift+retrieval int8",
)
BATCH = 512
"""Prompt tokens at once of llama.cpp, its default."""

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000, 8000], help="prompt tokens")
    parser.add_argument("--new", type=int, default=24, help="tokens to generate")
    parser.add_argument("--runs", type=int, default=2, help="runs of each side")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), help="which to run, such as 'llama.cpp Q8_0'")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = [measured(side, length, options) for length in options.lengths for side in options.sides]
    report = {"machine": machine(), "packages": PACKAGES, "new_tokens": options.new, "rows": rows}
    print(json.dumps(report, indent=1)) if options.json else Console(width=130).print(table(report))


def measured(side: str, length: int, options: argparse.Namespace) -> Row:
    """One side at one length; with `missing` where it cannot run here."""
    name, _, kind = side.partition(" ")
    if name in engine.SIDE:
        return engine.run_apart(side, length, options)
    print(f"{side}, {length} tokens ...", file=sys.stderr, flush=True)
    try:
        found = ask(name, {**PEERS[name](kind), "prompt": prompt(length), "new": options.new, "runs": options.runs})
    except (OSError, subprocess.CalledProcessError) as error:
        return {"side": side, "prompt_tokens": length, "missing": str(getattr(error, "stderr", "") or error)[-300:]}
    return {"side": side, "prompt_tokens": length, **summed(found)}


def summed(runs: list[Row]) -> Row:
    """Medians; `share` is what the least quiet run had of its threads' time."""
    gaps = [later - earlier for run in runs for earlier, later in pairwise(run["times"])]
    return {
        "ttft_s": statistics.median(run["times"][0] for run in runs),
        "tpot_ms": 1e3 * statistics.median(gaps),
        "peak_memory_mb": max(run["peak_kb"] for run in runs) / 1024,
        "share": min(run["cpu"] / (run["times"][-1] * num_threads()) for run in runs),
        "first_tokens": runs[0]["tokens"][:8],
    }


def prompt(length: int) -> list[int]:
    tokenizer = load(EngineConfig(dtype="bfloat16"), lambda message: None).tokenizer
    return tokens(tokenizer, length)


def llama_cpp(kind: str) -> Row:
    """The package's GGUF, or one of another type that is made from it once; ``Q4_1 flash``: with flash attention.

    On a CPU that was the slower one, so it is not the default.
    """
    kind, _, flash = kind.partition(" ")
    source = package_file()
    common = {"threads": num_threads(), "batch": BATCH, "flash": flash == "flash"}
    if kind == "Q4_1":
        return {"model": str(source), **common}
    made = cache_folder() / "peers" / f"{source.stem}-{kind}.gguf"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        ask("llama.cpp", {"model": str(source), "quantize": str(made), "type": kind})
    return {"model": str(made), **common}


def openvino(kind: str) -> Row:
    return {"model": str(package_file()), "threads": num_threads(), "batch": 1024, "paged": kind == "paged"}


PEERS: dict[str, Callable[[str], Row]] = {"llama.cpp": llama_cpp, "openvino": openvino}


def ask(name: str, question: Row) -> list[Row]:
    """What the peer's script answers to it, run by the Python of its environment."""
    command = [str(environment(name)), str(FOLDER / SCRIPTS[name])]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def environment(name: str) -> Path:
    """The Python of the peer's virtual environment, made the first time."""
    folder = cache_folder() / "peers" / name
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing {PACKAGES[name]} in {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        release = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"}
        command = [str(python), "-m", "pip", "install", "--quiet", PACKAGES[name]]
        subprocess.run(command, env=release, capture_output=True, text=True, check=True)
        (folder / "complete").touch()
    return python


def table(report: Row) -> Table:
    """Ratios are against the best peer of the same length."""
    title = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    result = Table("prompt", "side", title=f"{title}; {report['new_tokens']} new tokens")
    for column in ("TTFT s", "ratio", "TPOT ms", "ratio", "peak MB", "share"):
        result.add_column(column, justify="right")
    for row in report["rows"]:
        if "missing" in row:
            result.add_row(f"{row['prompt_tokens']:,}", row["side"], row["missing"])
            continue
        cells = [f"{row['prompt_tokens']:,}", row["side"]]
        for key, digits in (("ttft_s", 2), ("tpot_ms", 1)):
            cells += [f"{row[key]:.{digits}f}", f"{row[key] / best(report, row, key):.2f}x"]
        share = row["share"] if "share" in row else 1 - row["others_share"]
        result.add_row(*cells, f"{row['peak_memory_mb']:.0f}", f"{share:.2f}{'' if share >= QUIET else ' *'}")
    return result


def best(report: Row, like: Row, key: str) -> float:
    rows = [row for row in report["rows"] if row["prompt_tokens"] == like["prompt_tokens"] and "missing" not in row]
    peers = [row for row in rows if not row["side"].startswith("keysift")]
    return float(min(row[key] for row in peers or rows))


if __name__ == "__main__":
    main()
