"""Keysift's engine against transformers' `generate` on the embedded model: TTFT, TPOT and peak memory.

Each side runs in a process of its own, the sides of one length one after the other; prompts are real text (CPython's
documentation). Medians; a run during which other processes took more than 5 % of the cores is done again. Ratios are
against the better of transformers' sides, or against the first side where none of them runs. Prompts beyond the model's
8,192 tokens run with its rotary embedding stretched (YaRN), for their speed only: what it says there is worth nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil
import torch
from document import tokens
from peer_side import peak_kb
from rich.console import Console
from rich.table import Table
from timing import QUIET, machine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from keysift.engine import Engine, EngineConfig, Finish, Output, Request, SamplingParams, TokenOutput
from keysift.engine.model.embedded import embedded
from keysift.engine.model.tokenizer import Tokenizer

SIDES = ("transformers float32", "transformers bfloat16", "keysift dense")
ATTEMPTS = 6


class Run(NamedTuple):
    """Seconds from the start of a request to each of its tokens, the density of its prompt, and the tokens."""

    times: list[float]
    density: float
    tokens: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000, 8000], help="prompt tokens")
    parser.add_argument("--new", type=int, default=24, help="tokens to generate")
    parser.add_argument("--runs", type=int, default=3, help="undisturbed runs to take the median of")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--sides",
        nargs="+",
        default=list(SIDES),
        help="'transformers DTYPE', or 'keysift STRATEGY' in bfloat16, with ' int8' behind it for weights in 8 bits",
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.lengths[0], options.new, options.runs)))
        return
    rows = [run_apart(side, length, options) for length in options.lengths for side in options.sides]
    report = {"machine": machine(), "new_tokens": options.new, "runs": options.runs, "rows": rows}
    print(json.dumps(report, indent=1)) if options.json else Console(width=140).print(table(report))


def run_apart(side: str, length: int, options: argparse.Namespace) -> dict[str, object]:
    """One side in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--side", side, "--lengths", str(length)]
    command += ["--new", str(options.new), "--runs", str(options.runs)]
    print(f"{side}, {length} tokens ...", file=sys.stderr, flush=True)
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {"side": side, "prompt_tokens": length, **json.loads(lines[-1])}


def run_side(side: str, length: int, new: int, runs: int) -> dict[str, object]:
    name, _, kind = side.partition(" ")
    with folder(length + new) as model:
        once = SIDE[name](model, kind, length, new)
        if runs > 1:
            once()  # whatever is slow only once
        attempts = [undisturbed(once) for _ in range(runs)]
    return {
        **summed(attempts),
        "density": attempts[0][0].density,
        "peak_memory_mb": peak_kb() / 1024,
    }


def summed(attempts: list[tuple[Run, float]]) -> dict[str, object]:
    """Medians of runs, and what the least quiet of them left to others."""
    return {
        "ttft_s": statistics.median(run.times[0] for run, _ in attempts),
        "tpot_ms": 1e3 * statistics.median(gap for run, _ in attempts for gap in gaps(run.times)),
        "others_share": max(share for _, share in attempts),
        "first_tokens": attempts[0][0].tokens[:8],
    }


def undisturbed(once: Callable[[], Run], cpu_seconds: Callable[[], float] = time.process_time) -> tuple[Run, float]:
    """One run during which the rest of the machine was quiet, and the share of the cores that the rest had.

    Args:
        cpu_seconds: CPU seconds that the run's own processes have used so far.
    """
    for _ in range(ATTEMPTS):
        busy, own, wall = busy_seconds(), cpu_seconds(), time.perf_counter()
        run = once()
        cores = (time.perf_counter() - wall) * (psutil.cpu_count() or 1)
        others = (busy_seconds() - busy - (cpu_seconds() - own)) / cores
        if others <= 1 - QUIET:
            break
    return run, others


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used."""
    spent = psutil.cpu_times()
    return float(spent.user + spent.nice + spent.system)


def gaps(times: list[float]) -> Iterator[float]:
    yield from (later - earlier for earlier, later in pairwise(times))


@contextmanager
def folder(length: int) -> Iterator[Path]:
    """The embedded model, with its rotary embedding stretched where it was not trained for such a length."""
    model = embedded(lambda message: None)
    config = json.loads((model / "config.json").read_text())
    if length <= (native := config["max_position_embeddings"]):
        yield model
        return
    theta = config.get("rope_parameters", config)["rope_theta"]
    stretch = {"rope_type": "yarn", "factor": length / native, "original_max_position_embeddings": native}
    config |= {"max_position_embeddings": length, "rope_parameters": {**stretch, "rope_theta": theta}}
    with TemporaryDirectory() as name:
        for file in model.iterdir():
            (Path(name) / file.name).symlink_to(file)
        (Path(name) / "config.json").unlink()
        (Path(name) / "config.json").write_text(json.dumps(config))
        yield Path(name)


def transformers(path: Path, dtype: str, length: int, new: int) -> Callable[[], Run]:
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(path))
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    prompt = torch.tensor([tokens(tokenizer, length)])

    def once() -> Run:
        clock = Clock()
        with torch.inference_mode():
            model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=clock)
        return Run(clock.times, 1.0, clock.tokens)

    return once


class Clock(BaseStreamer):
    """Notes when each token arrives; the first call brings the prompt."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter() - self.start)
            self.tokens += value.tolist()
        self._prompt_seen = True

    def end(self) -> None:
        pass


def keysift(path: Path, strategy: str, length: int, new: int) -> Callable[[], Run]:
    name, _, quantization = strategy.partition(" ")
    config = {"model": str(path), "strategy": name, "quantization": quantization or "none"}
    engine = Engine(EngineConfig(dtype="bfloat16", **config))
    prompt = tuple(tokens(engine.tokenizer, length))
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)

    def once() -> Run:
        start, outputs = time.perf_counter(), list[Output]()
        times: list[float] = []
        engine.add(Request("benchmark", prompt, params, bypass_prefix_cache=True))
        while engine.has_work:
            outputs += engine.step()
            times += [time.perf_counter() - start] * (sum(isinstance(o, TokenOutput) for o in outputs) - len(times))
        finish = outputs[-1]
        assert isinstance(finish, Finish)
        said = [token for output in outputs if isinstance(output, TokenOutput) for token in output.token_ids]
        return Run(times, finish.sparsity.prefill_density, said)

    return once


SIDE = {"keysift": keysift, "transformers": transformers}


def table(report: dict[str, Any]) -> Table:
    title = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    columns = ("density", "TTFT s", "TTFT ratio", "TPOT ms", "TPOT ratio", "peak memory MB", "memory ratio")
    result = Table("prompt", "side", *columns, title=f"{title}; {report['new_tokens']} new tokens")
    for row in report["rows"]:
        peers = [
            r
            for r in report["rows"]
            if r["prompt_tokens"] == row["prompt_tokens"] and r["side"].startswith("transformers")
        ]
        same = [r for r in report["rows"] if r["prompt_tokens"] == row["prompt_tokens"]][:1]
        cells = [f"{row['prompt_tokens']:,}", row["side"], f"{row['density']:.3f}"]
        for key, digits in (("ttft_s", 2), ("tpot_ms", 1), ("peak_memory_mb", 0)):
            best = min(peer[key] for peer in peers or same)
            cells += [f"{row[key]:.{digits}f}", f"{row[key] / best:.2f}x"]
        result.add_row(*cells)
    return result


if __name__ == "__main__":
    main()
