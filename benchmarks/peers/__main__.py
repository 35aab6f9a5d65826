"""Keysift against its peers on a CPU: transformers, llama.cpp and OpenVINO GenAI, in one run.

The same model (the embedded one), the same real prompt as token ids, the same cores, greedy, a fixed number of tokens:
TTFT, TPOT (median over tokens and runs) and peak memory, each side in a process of its own, one after the other; as in
`benchmarks.engine`, a first run is not counted and a disturbed one is done again. llama.cpp and OpenVINO GenAI live in
virtual environments that the first run makes in the user's cache folder (llama.cpp is compiled, which takes minutes);
sides that cannot be made or run are named, and the others still run. Both read GGUF files: the package's own (Q4_1), or
another type made from it, of the same weights. A side's name is `PEER KIND`, followed by settings of its module:
'llama.cpp BF16 batch=2048 flash=true', 'openvino paged Q8_0 KV_CACHE_PRECISION=f16'.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from keysift.engine.model.embedded import cache_folder, embedded, package_file
from keysift.engine.model.tokenizer import Tokenizer
from keysift.kvcache.native.cores import num_threads

from ..engine.sides import SIDE, run_apart
from ..lib import cli
from ..lib.document import tokens
from ..lib.process import ROOT
from ..lib.runs import Run, summed, undisturbed
from ..lib.timing import QUIET, machine

PACKAGES = {"llama.cpp": "llama-cpp-python==0.3.36", "openvino": "openvino-genai==2026.4.1.0"}
BUILD = {"CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_BUILD_TESTS=OFF"}
"""Build flags of llama.cpp: every instruction set of this processor."""
MODULES = {"llama.cpp": "benchmarks.peers.llama_cpp", "openvino": "benchmarks.peers.openvino"}
"""Modules that run in the peers' environments, from `ROOT`; of the benchmarks they import `side` only."""
OURS = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "PYTHONPATH", "CMAKE_ARGS")
"""Settings of this process that must not reach a peer."""
SIDES = (
    "transformers float32",
    "transformers bfloat16",
    "llama.cpp Q4_1",
    "llama.cpp Q8_0",
    "llama.cpp BF16",
    "openvino stateful",
    "openvino paged",
    "openvino paged Q8_0",
    "keysift dense",
    "keysift sift+retrieval",
    "keysift sift+retrieval int8",
)
SHOWN = 8
"""Tokens of each side that are compared."""

Row = dict[str, Any]


class Failed(Exception):
    """A side cannot run here."""


def main() -> None:
    parser = cli.parser("benchmarks.peers", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000, 8000], help="prompt tokens")
    parser.add_argument("--new", type=int, default=24, help="tokens to generate")
    parser.add_argument("--runs", type=int, default=3, help="undisturbed runs of each side")
    parser.add_argument("--peers", nargs="+", help="only the sides of these: transformers llama.cpp openvino keysift")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), help="which to run, such as 'llama.cpp Q8_0'")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    sides = [side for side in options.sides if options.peers is None or side.split()[0] in options.peers]
    rows = [measured(side, length, options) for length in options.lengths for side in sides]
    report = {"machine": machine(), "packages": PACKAGES, "new_tokens": options.new, "runs": options.runs, "rows": rows}
    print(json.dumps(report, indent=1)) if options.json else Console(width=140).print(table(report))


def measured(side: str, length: int, options: argparse.Namespace) -> Row:
    """One side at one length; with `missing` where it cannot run here."""
    name, _, kind = side.partition(" ")
    try:
        if name in SIDE:
            return run_apart(side, length, options)
        question = {**PEERS[name](*words(kind)), "threads": num_threads()}
        print(f"{side}, {length} tokens ...", file=sys.stderr, flush=True)
        return {"side": side, "prompt_tokens": length, **run_peer(name, question, length, options)}
    except (Failed, subprocess.CalledProcessError) as error:
        reason = last_line(getattr(error, "stderr", None) or str(error))
        return {"side": side, "prompt_tokens": length, "missing": reason}


def words(kind: str) -> tuple[list[str], Row]:
    """The plain words of a side's name, and its settings: numbers, true and false as JSON has them, or text."""
    settings = dict(word.split("=", 1) for word in kind.split() if "=" in word)
    return [word for word in kind.split() if "=" not in word], {name: value(text) for name, text in settings.items()}


def value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def llama_cpp(plain: list[str], settings: Row) -> Row:
    return {"model": gguf(*plain), "batch": 512, "flash": False, **settings}


def openvino(plain: list[str], settings: Row) -> Row:
    backend, *kind = plain
    return {"model": gguf(*kind), "paged": backend == "paged", "batch": 1024, "sparse": False, **settings}


PEERS: dict[str, Callable[[list[str], Row], Row]] = {"llama.cpp": llama_cpp, "openvino": openvino}


def gguf(kind: str = "Q4_1") -> str:
    """The package's own file, or one of another type that llama.cpp makes from it the first time."""
    source = package_file()
    if source.stem.endswith(kind):
        return str(source)
    made = cache_folder() / "peers" / f"{source.stem}-{kind}.gguf"
    if not made.exists():
        unfinished = made.with_suffix(".unfinished")
        with Side("llama.cpp", {"model": str(source), "quantize": str(unfinished), "type": kind}):
            unfinished.rename(made)
    return str(made)


def run_peer(name: str, question: Row, length: int, options: argparse.Namespace) -> Row:
    with Side(name, {**question, "prompt": prompt(length), "new": options.new}) as side:
        if options.runs > 1:
            side.once()
        attempts = [undisturbed(side.once, side.cpu_seconds) for _ in range(options.runs)]
    return {**summed(attempts), "peak_memory_mb": side.last["peak_kb"] / 1024, "about": side.about}


class Side:
    """A peer's script, run by the Python of its environment, and what it answered last."""

    def __init__(self, name: str, question: Row) -> None:
        command = [str(environment(name)), "-m", MODULES[name]]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes: Row = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, env=plain_environment(), cwd=ROOT, **pipes)
        self._cpu = psutil.Process(self._process.pid)
        try:
            self.last = self._ask(json.dumps(question))
        except Failed:
            self.__exit__()
            raise
        self.about = self.last.get("about", "")

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def once(self) -> Run:
        self.last = self._ask("run")
        return Run(self.last["times"], 1.0, self.last["tokens"])

    def cpu_seconds(self) -> float:
        """CPU seconds of this process and the peer's."""
        own, peer = psutil.Process().cpu_times(), self._cpu.cpu_times()
        return float(own.user + own.system + peer.user + peer.system)

    def _ask(self, line: str) -> Row:
        """The next JSON line in reply to `line`; other output of the library is skipped."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(self._reason()) from None
        for answer in self._process.stdout:
            if answer.startswith("{"):
                found: Row = json.loads(answer)
                return found
        raise Failed(self._reason())

    def _reason(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        return self._errors.read() or f"ended with {self._process.returncode}"


@functools.cache
def prompt(length: int) -> list[int]:
    return tokens(Tokenizer(AutoTokenizer.from_pretrained(embedded(lambda message: None))), length)


def plain_environment() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if name not in OURS}


def environment(name: str) -> Path:
    """The Python of the peer's virtual environment, made the first time and when its recipe has changed."""
    if name in _unmade:
        raise Failed(_unmade[name])
    folder = cache_folder() / "peers" / name
    recipe = json.dumps([PACKAGES[name], BUILD])
    complete = folder / "complete"
    if not complete.exists() or complete.read_text() != recipe:
        install(name, folder)
        complete.write_text(recipe)
    return folder / "bin" / "python"


_unmade: dict[str, str] = {}
"""Why a peer's environment cannot be made: it is tried once."""


def install(name: str, folder: Path) -> None:
    """Past pip's cache, where a build with other flags may lie."""
    print(f"installing {PACKAGES[name]} in {folder} ...", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-cache-dir", PACKAGES[name]]
    done = subprocess.run(command, env={**plain_environment(), **BUILD}, capture_output=True, text=True)
    if done.returncode:
        _unmade[name] = f"not installed: {last_line(done.stderr)}"
        raise Failed(_unmade[name])


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"


def table(report: Row) -> Table:
    """Ratios are against the best peer of the same length; `same` counts first tokens that are the first side's."""
    title = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    result = Table("prompt", "side", title=f"{title}; {report['new_tokens']} new tokens")
    for column in ("TTFT s", "ratio", "TPOT ms", "ratio", "peak MB", "ratio", "others", "same"):
        result.add_column(column, justify="right")
    for row in report["rows"]:
        cells = [f"{row['prompt_tokens']:,}", row["side"]]
        result.add_row(*cells, *((row["missing"],) if "missing" in row else figures(report, row)))
    return result


def figures(report: Row, row: Row) -> list[str]:
    found = [other for other in report["rows"] if "missing" not in other]
    rows = [other for other in found if other["prompt_tokens"] == row["prompt_tokens"]]
    peers = [other for other in rows if not other["side"].startswith("keysift")] or rows
    cells = []
    for key, digits in (("ttft_s", 2), ("tpot_ms", 1), ("peak_memory_mb", 0)):
        best = min(peer[key] for peer in peers)
        cells += [f"{row[key]:.{digits}f}", f"{row[key] / best:.2f}x"]
    disturbed = "" if row["others_share"] <= 1 - QUIET else " *"
    return [*cells, f"{row['others_share']:.0%}{disturbed}", str(same(rows[0]["first_tokens"], row["first_tokens"]))]


def same(first: list[int], second: list[int]) -> int:
    """Number of first tokens that two sides have in common."""
    pairs = enumerate(zip(first[:SHOWN], second[:SHOWN], strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second), SHOWN))


if __name__ == "__main__":
    main()
