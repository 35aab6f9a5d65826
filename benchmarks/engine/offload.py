"""One request whose KV cache is larger than the memory for it: time per token and peak memory, against a resident one.

The embedded model in bf16 on real text (CPython's documentation); beyond its 8,192 tokens with a stretched rotary
embedding (YaRN), for speed and memory only. Every side runs in a process of its own. *resident*: all pages in memory.
*offloaded*: a pool of ``--share`` of the keys and values, the rest in a file in ``--folder``, which the system's page
cache may hold. *evicted*: the same, and before every token the file is written out and dropped from the page cache, so
that every page that a token misses comes from the disk. TPOT is the median over the last tokens, once the pool is warm;
a run during which other processes took more than 5 % of the cores is done again. *over*: peak resident memory of the
process less what it had when model and cache were laid out and nothing had run; *given*: pool, summaries and codes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from keysift.engine import Engine, EngineConfig, Finish, Request, SamplingParams, TokenOutput
from keysift.kvcache import OffloadTier
from keysift.kvcache.tiers.file_store import FileStore

from ..lib import cli
from ..lib.document import tokens
from ..lib.process import printed
from ..lib.runs import busy_seconds
from ..lib.timing import QUIET, machine


class Side(NamedTuple):
    """Strategy and placement of one side."""

    strategy: str
    arguments: tuple[str, ...] = ()
    offloaded: bool = True
    evicted: bool = False
    prefetch: int = 0


SIDES = {
    "resident retrieval": Side("sift+retrieval", offloaded=False),
    "offloaded retrieval": Side("sift+retrieval"),
    "resident nosa": Side("sift+nosa", offloaded=False),
    "offloaded nosa": Side("sift+nosa"),
    "evicted retrieval": Side("sift+retrieval", evicted=True),
    "evicted retrieval, prefetch 16": Side("sift+retrieval", evicted=True, prefetch=16),
    "evicted nosa": Side("sift+nosa", evicted=True),
    "evicted nosa, prefetch 16": Side("sift+nosa", evicted=True, prefetch=16),
    "streaming prompt, offloaded nosa": Side("streaming+nosa"),
}
WARM = 16
"""Tokens before the clock counts."""
ATTEMPTS = 4
NATIVE = 8192


def main() -> None:
    parser = cli.parser("benchmarks.engine.offload", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8000, 32000], help="prompt tokens")
    parser.add_argument("--new", type=int, default=80, help="tokens to generate")
    parser.add_argument("--share", type=float, default=0.125, help="pool, as a share of the request's keys and values")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="folder of the backing file")
    parser.add_argument("--sides", nargs="+", default=list(SIDES)[:-1], choices=SIDES, metavar="SIDE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run(SIDES[options.side], options)))
        return
    rows = [run_apart(side, length, options) for length in options.lengths for side in options.sides]
    report = {"machine": machine(), "share": options.share, "new_tokens": options.new, "rows": rows}
    print(json.dumps(report, indent=1)) if options.json else Console(width=180).print(table(report))


def run_apart(side: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    print(f"{side}, {length} tokens ...", file=sys.stderr, flush=True)
    request = ("--side", side, "--lengths", length, "--new", options.new)
    memory = ("--share", options.share, "--folder", options.folder.resolve())
    return {"side": side, "prompt_tokens": length, **printed("benchmarks.engine.offload", *request, *memory)}


def run(side: Side, options: argparse.Namespace) -> dict[str, float | None]:
    length = options.lengths[0]
    engine = open_engine(side, length + options.new, options)
    before = psutil.Process().memory_info().rss
    prompt = tuple(tokens(engine.tokenizer, length))
    attempts = []
    for _ in range(ATTEMPTS):
        attempts.append(once(engine, prompt, options.new, evictor(engine) if side.evicted else lambda: None))
        if attempts[-1]["others_share"] <= 1 - QUIET:
            break
    tier, spec = engine.cache.tier, engine.cache.spec
    described = engine.cache.allocator.total * (spec.page_bytes - spec.kv_bytes)
    pool = tier.size.bytes(spec) if isinstance(tier, OffloadTier) else engine.cache.allocator.total * spec.kv_bytes
    return {
        **min(attempts, key=lambda attempt: attempt["others_share"]),
        "kv_mb": spec.pages_for(length + options.new) * spec.kv_bytes / 1e6,
        "given_mb": (pool + described) / 1e6,
        "over_mb": peak_bytes() / 1e6 - before / 1e6,
        "peak_mb": peak_bytes() / 1e6,
    }


def peak_bytes() -> int:
    """The most resident memory that the process has had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def open_engine(side: Side, length: int, options: argparse.Namespace) -> Engine:
    fields: dict[str, Any] = {"max_model_len": length, "max_num_seqs": 1, "prefix_cache": False, "dtype": "bfloat16"}
    if length > NATIVE:
        fields |= {"rope_scaling": "yarn"}
    if side.offloaded:
        kv = 30 * 3 * 4096 * -(-length // 16)  # of the embedded model: layers, KV heads, bytes of a head's page
        fields |= {
            "kv_offload": str(options.folder),
            "kv_memory": int(options.share * kv),
            "kv_prefetch": side.prefetch,
        }
    fields |= {"strategy": side.strategy, "strategy_args": side.arguments}
    return Engine(EngineConfig(**fields), lambda message: print(message, file=sys.stderr))


def evictor(engine: Engine) -> Callable[[], None]:
    """Write the backing file out and drop it from the page cache."""
    tier = engine.cache.tier
    assert isinstance(tier, OffloadTier)
    store = tier.pages.store
    assert isinstance(store, FileStore)

    def evict() -> None:
        os.fdatasync(store.fileno())
        os.posix_fadvise(store.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    return evict


def once(engine: Engine, prompt: tuple[int, ...], new: int, prepare: Callable[[], None]) -> dict[str, Any]:
    """One request; the time that `prepare` takes before a token is not counted."""
    engine.add(Request("one", prompt, SamplingParams(max_new_tokens=new, ignore_eos=True)))
    times: list[float] = []
    start = time.perf_counter()
    ttft = 0.0
    before = engine.cache.tier.traffic
    while engine.has_work:
        if len(times) == WARM:
            before, busy, own, wall = (
                engine.cache.tier.traffic,
                busy_seconds(),
                time.process_time(),
                time.perf_counter(),
            )
        if times:
            prepare()
        began = time.perf_counter()
        outputs = engine.step()
        if any(isinstance(output, TokenOutput) for output in outputs):
            ttft = ttft or time.perf_counter() - start
            times.append(time.perf_counter() - began)
    finish = outputs[-1]
    assert isinstance(finish, Finish)
    cores = (time.perf_counter() - wall) * (psutil.cpu_count() or 1)
    traffic, counted = engine.cache.tier.traffic - before, len(times) - WARM
    return {
        "ttft_s": ttft,
        "tpot_ms": 1e3 * statistics.median(times[WARM:]),
        "density": finish.sparsity.decode_density,
        "overlap": finish.sparsity.kv_overlap,
        "fetched_mb": traffic.fetched / counted / 1e6,
        "hits": traffic.hits / max(traffic.hits + traffic.misses, 1),
        "guessed": traffic.prefetch_hits / traffic.prefetched if traffic.prefetched else None,
        "others_share": (busy_seconds() - busy - (time.process_time() - own)) / cores,
    }


def table(report: dict[str, Any]) -> Table:
    title = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    columns = ("TTFT s", "TPOT ms", "ratio", "density", "hits", "overlap", "MB a token", "guesses read")
    memory = ("KV MB", "given MB", "over MB", "peak MB", "others")
    result = Table("prompt", "side", *columns, *memory, title=f"{title}; pool {report['share']} of the KV")
    for row in report["rows"]:
        own = "nosa" if "nosa" in row["side"] else "retrieval"
        base = [r for r in report["rows"] if r["prompt_tokens"] == row["prompt_tokens"]]
        base = [r for r in base if r["side"] == f"resident {own}"] or base[:1]
        cells = [f"{row['prompt_tokens']:,}", row["side"], f"{row['ttft_s']:.1f}", f"{row['tpot_ms']:.1f}"]
        cells += [f"{row['tpot_ms'] / base[0]['tpot_ms']:.2f}x", f"{row['density']:.3f}", f"{row['hits']:.3f}"]
        cells += ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("overlap",)]
        cells += [f"{row['fetched_mb']:.2f}", "-" if row["guessed"] is None else f"{row['guessed']:.2f}"]
        cells += [f"{row[key]:.0f}" for key in ("kv_mb", "given_mb", "over_mb", "peak_mb")]
        result.add_row(*cells, f"{row['others_share']:.2f}")
    return result


if __name__ == "__main__":
    main()
