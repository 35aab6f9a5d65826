"""`benchmarks.gpu`: all of it with tiny sizes on the CPU, its arithmetic, and what it says of what fails."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import correctness
from benchmarks.lib.process import ROOT, command

TABLES = ("correctness", "prefill", "decode", "offload", "model")
CHECKS = 20 * 3
"""Ops and how they are called, in each dtype."""
TIMES = ("ms", "attend_ms", "choose_ms", "us", "attend_us", "choose_us", "TTFT s", "TPOT ms")
RATES = ("GB/s", "TFLOP/s", "attend GB/s", "of copy")


def run(out: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(command("benchmarks.gpu", "--out", out, *words), capture_output=True, text=True, cwd=ROOT)
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    return run(tmp_path_factory.mktemp("gpu") / "gpu.json", "--smoke")


def rows_of(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, table in report["tables"].items() for row in table["rows"]]


def measured(row: dict[str, Any], names: tuple[str, ...]) -> list[float]:
    return [row[name] for name in names if row.get(name) is not None]


def test_every_table_is_there(smoke: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    done, report = smoke
    assert done.returncode == 0, done.stderr
    assert tuple(report["tables"]) == TABLES
    assert all(table["rows"] for table in report["tables"].values())
    assert all(name in done.stdout for name in TABLES)
    assert report["seed"] == 0
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["commit"].rstrip("+")) in (40, len(report["versions"]["keysift"]))


def test_every_row_has_times_or_says_why_not(smoke: tuple[Any, dict[str, Any]]) -> None:
    for table, row in rows_of(smoke[1]):
        if "error" in row:
            assert row["what"] == "torch cudnn", row
        elif "skipped" in row:
            assert row["what"].startswith("flex "), row
        elif table != "correctness":
            numbers = measured(row, TIMES + RATES)
            assert numbers, row
            assert all(math.isfinite(number) and number > 0 for number in numbers), row


def test_shares_are_shares(smoke: tuple[Any, dict[str, Any]]) -> None:
    for _, row in rows_of(smoke[1]):
        for name in ("density", "decode density", "coverage", "least", "overlap"):
            assert row.get(name) is None or 0 <= row[name] <= 1 + 1e-6, row


def test_strategies_of_each_table(smoke: tuple[Any, dict[str, Any]]) -> None:
    what = {name: [row["what"] for row in table["rows"]] for name, table in smoke[1]["tables"].items()}
    strategies = {"flexprefill 0.95", "flexprefill 0.9", "sampleattention 0.95", "sift"}
    assert {"torch flash", "dense", "10% of the pairs"} | strategies <= set(what["prefill"])
    sides = ["torch sdpa", "dense", *(f"{name} {n}" for n in (128, 256) for name in ("quest", "retrieval", "nosa"))]
    assert what["decode"] == ["copy within the device", *sides, *sides]
    assert what["model"] == ["dense", "sift+retrieval"]
    assert what["offload"][1:3] == ["retrieval, resident", "retrieval, offloaded"]


def test_checks_pass(smoke: tuple[Any, dict[str, Any]]) -> None:
    rows = smoke[1]["tables"]["correctness"]["rows"]
    assert len(rows) == CHECKS
    assert all(row["passed"] and 0 <= row["worst"] <= row["limit"] for row in rows)


def test_a_cpu_claims_nothing_about_a_gpu(smoke: tuple[Any, dict[str, Any]]) -> None:
    report = smoke[1]
    assert report["device"]["type"] == "cpu"
    assert report["device"]["capability"] is report["device"]["memory"] is None
    assert report["versions"]["cuda"] is report["versions"]["driver"] is None
    aims = [aim for table in report["tables"].values() for aim in table["aims"]]
    assert aims
    assert all((aim["verdict"], aim["value"]) == ("not measured", None) for aim in aims)
    assert not any("graph us" in row for _, row in rows_of(report))


def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA GPU here: `--smoke` tries the script on the CPU"):
        gpu.main()


def in_process(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", *words])
    try:
        with torch.inference_mode(), pytest.raises(SystemExit) as ended:
            gpu.main()
    finally:
        torch.set_num_threads(threads)
    return int(ended.value.code or 0)


def test_a_failed_check_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: object) -> tuple[float, float]:
        raise RuntimeError("an illegal memory access")

    checks = {
        "right": lambda _: (0.5, 1.0),
        "wrong": lambda _: (1.5, 1.0),
        "nan": lambda _: (math.nan, 1.0),
        "broken": broken,
    }
    monkeypatch.setattr(correctness, "CHECKS", checks)
    out = tmp_path / "gpu.json"
    assert in_process(monkeypatch, "--tables", "correctness", "--out", str(out)) == 1
    rows = json.loads(out.read_text())["tables"]["correctness"]["rows"]
    assert [row["passed"] for row in rows] == [True] * 3 + [False] * 9
    assert rows[6]["worst"] == "nan", "a word: JSON has no such number"
    assert rows[-1]["error"] == "RuntimeError: an illegal memory access"


def test_a_table_in_a_process_of_its_own_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = gpu.command

    def crash_decode(options: Any, table: str, out: Path) -> list[str]:
        killed = [sys.executable, "-c", "import os; os.abort()"]
        return killed if table == "decode" else made(options, table, out)

    monkeypatch.setattr(gpu, "command", crash_decode)
    out = tmp_path / "gpu.json"
    words = ("--apart", "--tables", "decode", "correctness", "--out", str(out))
    assert in_process(monkeypatch, *words) == 0
    tables = json.loads(out.read_text())["tables"]
    assert tables["decode"]["rows"] == [{"what": "all of it", "error": "its process ended with -6"}]
    assert len(tables["correctness"]["rows"]) == CHECKS
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.gpu
def test_the_real_thing_in_small(tmp_path: Path) -> None:
    done, report = run(tmp_path / "gpu.json", "--small", "--runs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["device"]["type"] == "cuda"
    assert tuple(report["tables"]) == TABLES
    failed = [row for _, row in rows_of(report) if "error" in row and not row["what"].startswith(("torch ", "flex "))]
    assert not failed
    for table, row in rows_of(report):
        if table != "correctness" and "error" not in row:
            assert all(math.isfinite(number) and number > 0 for number in measured(row, TIMES + RATES)), row
