"""The table of a profile: complete, consistent with itself, and never half written."""

from __future__ import annotations

import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from keysift.attention import PARTS
from keysift.engine import Engine, EngineConfig, InvalidRequest, Output, Unsupported
from keysift.engine.measure.environment import commit
from keysift.engine.measure.percentiles import p99
from keysift.engine.measure.profiling import measure, quiet
from keysift.engine.measure.profiling.drive import Run, Stepped
from keysift.engine.measure.profiling.peak import PeakMemory
from keysift.engine.measure.profiling.profiler import Profiler, make_engine
from keysift.engine.measure.profiling.prompts import Prompts, read
from keysift.engine.measure.profiling.quiet import Watch, cpu_share, disturbed
from keysift.engine.measure.profiling.settings import Profile

SPARSE = "dense+quest,quest.dense_below=0,quest.dense_layers=0,quest.sink=16,quest.window=32,quest.budget=64"
METRICS = ("ttft", "tpot", "itl", "e2el")
FIELDS = {
    *("strategy", "input_len", "output_len", "batch_size", "runs", "disturbed", "cpu_share", "others_share"),
    *(f"{name}_ms" for name in METRICS),
    *(f"{kind}_{name}_ms" for name in METRICS for kind in ("mean", "median", "std", "p99")),
    *("prefill_latency", "decode_latency", "ttfts", "itls", "input_lens", "output_lens"),
    *("request_throughput", "output_throughput", "total_token_throughput"),
    *("peak_memory_bytes", "peak_memory_scope", "kv_bytes", "kv_bytes_read", "kv_bytes_moved"),
    *("prefill_density", "decode_density", "coverage", "shares"),
}
Open = Callable[..., Profiler]


def quietly(done: int, total: int, title: str) -> None:
    pass


@pytest.fixture
def open_profiler(tiny_llama: Path, tmp_path: Path) -> Open:
    """A profiler of the tiny model. What others do on this machine does not disturb it."""

    def build(engine: dict[str, Any] | None = None, **settings: Any) -> Profiler:
        small = {"strategies": ("dense",), "input_lens": (70,), "output_len": 6, "runs": 1, "attempts": 1, "warmup": 0}
        profile = Profile(**small | {"output_dir": tmp_path} | settings)
        fields = {"model": str(tiny_llama), "dtype": "float32", "prefill_chunk": 64, "kv_memory": 2**22}
        return Profiler(profile, make_engine(profile, EngineConfig(**fields | (engine or {})), lambda message: None))

    return build


def test_every_cell_is_complete_and_agrees_with_itself(open_profiler: Open, tmp_path: Path) -> None:
    profiler = open_profiler(strategies=("dense", SPARSE), input_lens="200,70", batch_sizes=(1, 2), runs=2)
    found = profiler.go(quietly)
    assert json.loads((tmp_path / "profile.json").read_text()) == found
    keys = {"schema", "created", "finished", "environment", "model", "engine", "settings", "cells"}
    assert set(found) == keys
    assert found["engine"]["prefill_chunk"] == profiler.engine.config.prefill_chunk
    assert (found["schema"], found["finished"]) == ("keysift.profile/1", True)
    cells = found["cells"]
    names = [(cell["input_len"], cell["batch_size"], cell["strategy"]) for cell in cells]
    assert names == [(length, count, name) for length in (70, 200) for count in (1, 2) for name in ("dense", SPARSE)]
    for cell in cells:
        check(cell, runs=2)
    assert [cell["decode_density"] < 1 for cell in cells[-4:]] == [False, True, False, True]
    assert all(cell["prefill_density"] == 1 for cell in cells)
    assert cells[-3]["kv_bytes_read"] < cells[-4]["kv_bytes_read"]


def check(cell: dict[str, Any], runs: int) -> None:
    """The fields against each other, each from its definition."""
    assert set(cell) == FIELDS
    count, new = cell["batch_size"], cell["output_len"]
    assert cell["input_lens"] == [cell["input_len"]] * count * runs
    assert cell["output_lens"] == [new] * count * runs
    e2els = [ttft + sum(gaps) for ttft, gaps in zip(cell["ttfts"], cell["itls"], strict=True)]
    tpots = [statistics.fmean(gaps) for gaps in cell["itls"]]
    assert {len(gaps) for gaps in cell["itls"]} == {new - 1}
    gaps = [gap for each in cell["itls"] for gap in each]
    for name, seconds in (("ttft", cell["ttfts"]), ("tpot", tpots), ("itl", gaps), ("e2el", e2els)):
        assert cell[f"mean_{name}_ms"] == pytest.approx(1e3 * statistics.fmean(seconds))
        assert cell[f"median_{name}_ms"] == pytest.approx(1e3 * statistics.median(seconds))
        assert cell[f"std_{name}_ms"] == pytest.approx(1e3 * statistics.pstdev(seconds))
        assert cell[f"median_{name}_ms"] <= cell[f"p99_{name}_ms"] <= 1e3 * max(seconds) + 1e-9
        spread = cell[f"{name}_ms"]
        assert spread["min"] <= spread["median"] <= spread["max"]
    duration = runs / cell["request_throughput"] * count
    assert duration >= sum(max(e2els[i * count : (i + 1) * count]) for i in range(runs))
    assert cell["output_throughput"] == pytest.approx(new * count * runs / duration)
    assert cell["total_token_throughput"] == pytest.approx((new + cell["input_len"]) * count * runs / duration)
    assert 0 < cell["prefill_latency"] <= duration
    assert 0 < cell["decode_latency"] <= max(gaps)
    assert {*cell["shares"]} == {"prefill", "decode"}
    for spent in cell["shares"].values():
        assert list(spent) == list(PARTS)
        assert all(seconds > 0 for seconds in spent.values())
    pages = count * -(-(cell["input_len"] + new) // 16)
    assert cell["kv_bytes"] == pages * 16 * 2 * 2 * 2 * 8 * 4  # tokens, K and V, layers, heads, dims, bytes
    assert cell["peak_memory_bytes"] > cell["kv_bytes"]


def test_an_interrupted_run_leaves_what_it_has(
    open_profiler: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler, count = open_profiler(input_lens=(70, 80)), 0
    step = Engine.step

    def interrupted(engine: Engine) -> list[Output]:
        nonlocal count
        count += 1
        if count > 20:  # each of the first cell's two passes takes 2 + 5 steps
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profiler.go(quietly)
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["finished"] is False
    assert [cell["input_len"] for cell in found["cells"]] == [70]
    assert not list(tmp_path.glob(".*"))


def test_a_cell_that_fails_is_a_row_and_the_rest_goes_on(
    open_profiler: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profiler = open_profiler(strategies=("dense", SPARSE))
    run = profiler.engine.runner.run

    def short(batch: Any, states: Any) -> Any:
        if batch.strategy.name != "dense":
            raise torch.OutOfMemoryError("too little")
        return run(batch, states)

    monkeypatch.setattr(profiler.engine.runner, "run", short)
    good, bad = profiler.go(quietly)["cells"]
    check(good, runs=1)
    assert bad.pop("error").startswith("memory: not enough for")
    assert bad == {"strategy": SPARSE, "input_len": 70, "output_len": 6, "batch_size": 1}
    assert json.loads((tmp_path / "profile.json").read_text())["finished"]
    assert not profiler.engine.has_work


@pytest.mark.parametrize(
    ("settings", "engine", "words"),
    [
        ({"input_lens": (70, 507)}, {}, "input_lens: at most 506 tokens beside output_len 6.*512.*got 507"),
        ({"input_lens": (500,)}, {"kv_memory": 2**17}, "input_lens: fewer tokens than 500 .*kv_memory"),
        ({"batch_sizes": (1, 200), "input_lens": (300,)}, {"max_num_seqs": 300}, "batch_sizes: 200 prompts of 300"),
        ({"batch_sizes": (3,)}, {"max_num_seqs": 2}, r"batch_sizes: at most max_num_seqs \(2\), got 3"),
        ({"input_lens": "70,x"}, {}, "input_lens.1: .*got 'x'"),
        ({"input_lens": (0,)}, {}, "input_lens.0: .*got '0'"),
        ({"output_len": 1}, {}, "output_len: .*got 1"),
        ({"strategies": ("dens",)}, {}, "strategy: .*dens"),
        ({"text": Path("missing.txt")}, {}, "text: a readable text file, got 'missing.txt'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    settings: dict[str, Any], engine: dict[str, Any], words: str, open_profiler: Open, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        open_profiler(engine, **settings)
    assert not list(tmp_path.iterdir())


def test_a_strategy_that_does_not_fit_the_cache_is_refused(open_profiler: Open) -> None:
    with pytest.raises(Unsupported, match="retrieval"):
        open_profiler({"code_bits": 0}, strategies=("dense+retrieval",))


def made_run(cpu: float) -> Run:
    return Run([Stepped("prefill", 2.0, cpu, []), Stepped("decode", 1.0, 0.0, [])], 3.0, [[2.0, 3.0]], [])


def test_a_disturbed_run_is_repeated_and_at_last_marked(open_profiler: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = open_profiler(runs=2, attempts=5)
    bench, (cell,) = profiler.bench, profiler.settings.cells()
    told: list[bool] = []

    def scripted(others: list[float]) -> list[measure.Attempt]:
        said = iter(others)
        monkeypatch.setattr(measure, "cpu_share", lambda run: 0.99)
        monkeypatch.setattr(measure.Watch, "others", lambda watch: next(said))
        return bench._undisturbed(cell, lambda: told.append(True))

    assert [attempt.others for attempt in scripted([0.2, 0.01, 0.3, 0.02, 0.9])] == [0.01, 0.02]
    assert len(told) == 4
    kept = scripted([0.4, 0.2, 0.3, 0.01, 0.5])
    assert [(attempt.others, attempt.disturbed) for attempt in kept] == [(0.01, False), (0.2, True)]


def test_who_shares_the_cores_disturbs() -> None:
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert cpu_share(made_run(1.5)) == 0.75
    finally:
        torch.set_num_threads(torch_threads)
    assert disturbed(0.94, 0.0, on_cpu=True)
    assert disturbed(0.99, 0.06, on_cpu=True)
    assert not disturbed(0.96, 0.04, on_cpu=True)
    assert not disturbed(0.1, 0.04, on_cpu=False)


def test_others_count_where_this_process_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [SimpleNamespace(user=100.0 * core, nice=20.0, system=3.0, idle=7.0) for core in range(4)]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: seconds)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 3})
    assert quiet._busy() == 123.0 + 323.0


@pytest.mark.parametrize(("limit", "cores"), [("150000 100000", 1.5), ("100000 200000", 0.5)])
def test_others_count_within_a_containers_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, cores: float
) -> None:
    def use(seconds: int) -> None:
        (tmp_path / "cpu.stat").write_text(f"usage_usec {seconds * 10**6}\nuser_usec 1\nsystem_usec 1\n")

    monkeypatch.setattr(quiet, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    use(500)
    begun = time.perf_counter()
    watch = Watch()
    inner = time.perf_counter()
    use(1500)
    least = time.perf_counter() - inner
    others = watch.others()
    most = time.perf_counter() - begun
    assert 0.99 * 1000 / (most * cores) <= others <= 1000 / (least * cores)


@pytest.mark.parametrize("limit", ["max 100000", "6400000 100000", None])
def test_a_quota_that_bounds_nothing_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None
) -> None:
    """There is no cpu.stat in the folder."""
    monkeypatch.setattr(quiet, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit)
    assert Watch().others() >= 0


BURN = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\nsys.stdin.read()"


def test_a_rank_of_the_team_is_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the machine computed meanwhile, by what this process is told, was computed by its child; but for the
    grain of the system's clocks."""
    monkeypatch.setattr(quiet, "_busy", iter([0.0, 0.4]).__next__)
    watch = Watch()
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert watch.others() == 0.0


def test_prompts_have_exact_lengths_and_begin_at_other_places(open_profiler: Open, tmp_path: Path) -> None:
    tokenizer = open_profiler().engine.tokenizer
    prompts = Prompts(tokenizer, "0123456789", seed=0, longest=100)
    text = [tokenizer.decode(prompt) for prompt in prompts.batch(2, 25)]
    assert [len(words) for words in text] == [25, 25]
    twice = "0123456789" * 4
    start = int(text[0][0])
    assert text == [twice[start : start + 25], twice[(start + 5) % 10 :][:25]]
    assert prompts.batch(2, 25) == Prompts(tokenizer, "0123456789", seed=0, longest=100).batch(2, 25)
    assert len({tuple(Prompts(tokenizer, read(None), seed, 100).batch(1, 50)[0]) for seed in range(5)}) == 5
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InvalidRequest, match="text: some text, got none"):
        Prompts(tokenizer, read(tmp_path / "empty.txt"), 0, 100)


def test_peak_memory_is_the_cells_own() -> None:
    before = PeakMemory(torch.device("cpu"))
    ballast = torch.ones(2**25)  # 128 MiB
    high = before.bytes()
    del ballast
    after = PeakMemory(torch.device("cpu"))
    if after.scope == "process":
        pytest.skip("the system cannot forget a peak")
    assert high - after.bytes() > 2**26


def test_several_gpus_are_awaited_and_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, asked = [torch.device("cuda:0"), torch.device("cuda:1")], []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10 ** (1 + device.index))
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    assert PeakMemory(*gpus).bytes() == 110
    measure.settle([*gpus, torch.device("cpu")])
    assert asked == 2 * gpus


def test_the_trace_shows_each_layers_work(open_profiler: Open, tmp_path: Path) -> None:
    open_profiler(strategies=("dense", SPARSE), input_lens=(70, 200)).go(quietly)
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        trace = json.load(file)
    events = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert (tmp_path / "trace.json.gz").stat().st_size < 2**20
    for strategy in ("dense", SPARSE):
        (whole,) = named(events, f"{strategy}, 200 tokens")
        mine = [event for event in events if within(event, whole)]
        assert len(named(mine, "prefill")) == 1, "the last chunk alone"
        assert len(named(mine, "decode")) == 4
        for step in named(mine, "prefill") + named(mine, "decode"):
            (model,) = [event for event in named(mine, "model") if within(event, step)]
            inside = [event for event in mine if within(event, model)]
            for layer in range(2):
                (attention,) = named(inside, f"layer {layer} attention")
                assert len(named(inside, f"layer {layer} selection")) == 1
                assert any(within(fetch, attention) for fetch in named(inside, f"layer {layer} fetch"))
            assert sum(within(event, step) for event in named(mine, "sampling")) == 1


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["name"] == name]


def within(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    """Microseconds, written to three digits."""
    slack = 0.01
    ends = (event["ts"] + event["dur"] for event in (inner, outer))
    return inner["tid"] == outer["tid"] and outer["ts"] - slack <= inner["ts"] and next(ends) <= next(ends) + slack


def test_percentiles_lie_between_the_values() -> None:
    assert p99([0.0, 1.0]) == pytest.approx(0.99)
    assert p99([float(value) for value in range(101)]) == 99
    assert p99([7.0]) == 7
    assert p99([1.0, 1.0]) == 1


def test_progress_ends_where_it_should(open_profiler: Open) -> None:
    seen: list[tuple[int, int, str]] = []
    open_profiler(strategies=("dense", SPARSE), warmup=1, runs=2, attempts=4).go(lambda *told: seen.append(told))
    done = [each[0] for each in seen]
    assert done == sorted(done)
    assert done[-1] == seen[0][1] == seen[-1][1]
    assert seen[0][2] == "dense, 70 tokens"


def test_the_commit_is_that_of_this_source_alone(tmp_path: Path) -> None:
    found, in_checkout = commit(), (Path(__file__).parents[4] / ".git").exists()
    assert len(found.rstrip("+")) == 40 if found else not in_checkout
    assert commit(tmp_path) is None
